"""The stages of a distillation pipeline, by the kind that a manifest calls them. Importing them imports no torch."""

from stages.base import Stage
from stages.distill import Distill
from stages.evaluate import Evaluate
from stages.latents import Latents
from stages.pairs import Pairs
from stages.registry import Registry
from stages.teacher import Teacher

KINDS: Registry[Stage] = Registry(
    "retort.kinds",
    Stage,
    "kind",
    {"teacher": Teacher, "pairs": Pairs, "latents": Latents, "distill": Distill, "evaluate": Evaluate},
    reserved=("locks", "runs", "work"),  # a store's own folders, beside those of the kinds
)
