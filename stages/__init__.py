"""The registry of stage kinds, by their names in a manifest. Importing this module does not import torch."""

from stages.base import Stage
from stages.distill import Distill
from stages.evaluate import Evaluate
from stages.latents import Latents
from stages.optimize import Optimize
from stages.pairs import Pairs
from stages.perceptual import Perceptual
from stages.probe import Probe
from stages.reference import Reference
from stages.registry import Registry
from stages.teacher import Teacher

KINDS: Registry[Stage] = Registry(
    "retort.kinds",
    Stage,
    "kind",
    {
        "teacher": Teacher,
        "latents": Latents,
        "pairs": Pairs,
        "perceptual": Perceptual,
        "distill": Distill,
        "optimize": Optimize,
        "probe": Probe,
        "reference": Reference,
        "evaluate": Evaluate,
    },
    reserved=("locks", "runs", "work"),  # folders that a store has besides those of the kinds
)
