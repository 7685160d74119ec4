"""The stages of a distillation pipeline, by the kind that a manifest calls them. Importing them imports no torch."""

from stages.base import Stage
from stages.distill import Distill
from stages.evaluate import Evaluate
from stages.pairs import Pairs
from stages.teacher import Teacher

KINDS: dict[str, type[Stage]] = {
    "teacher": Teacher,
    "pairs": Pairs,
    "distill": Distill,
    "evaluate": Evaluate,
}
