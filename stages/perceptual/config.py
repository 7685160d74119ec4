"""Settings for training a perceptual network. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from stages.base import Artifact, Config
from stages.data.triplets.config import TripletSet
from stages.training import TrainingSettings


class Classification(Config):
    """How the trunk is trained: by the cross-entropy of the images' classes, summed over labels if there are several.

    The paper (2405.05967) trains on ImageNet and does not describe the recipe. Ours uses AdamW, and random shifts of up
    to 1/16 of the side in whole pixels, with reflected borders. Inputs of fewer than 16 pixels are not shifted.
    """

    training: TrainingSettings = Field(description="how the trunk and the classifier are trained")
    dropout: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="dropout after each hidden layer of the classifier, as in VGG; narrow networks are better with 0",
    )
    mirror: bool = Field(
        False,
        description="whether half of the images are mirrored; leave it off where left and right matter, as for digits",
    )


class CalibrationTraining(TrainingSettings):
    """How the heads are trained. The defaults are those of the LPIPS script (Zhang et al. 2018, 1801.03924): Adam with
    learning rate 1e-4, constant for half of the steps and then falling linearly. The script takes about 30,000 steps of
    50 triplets. Unlike the script, Retort clips gradients and averages weights, as it always does."""

    batch_size: int = Field(50, ge=1, description="triplets in a batch; an optimizer step uses `accumulate` batches")
    learning_rate: float = Field(1e-4, gt=0, description="learning rate after the warm-up and before the decay")
    decay: Literal["constant", "cosine", "linear"] = Field(
        "linear",
        description="fall of the learning rate: none, half a cosine, or linear to zero over the second half",
    )
    betas: tuple[float, float] = Field(
        (0.5, 0.999),
        strict=False,
        description="Adam's decay rates of the averages of gradients and of squared gradients",
    )


class Calibration(Config):
    """How the heads, which are the weights of the channels, are trained. They are fitted to judgements of which of two
    distorted images is closer to a reference."""

    training: CalibrationTraining = Field(description="how the heads are trained")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="dropout of the squared differences, before the heads weight them"
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of a `perceptual` stage. A field is None if the stage does not use it."""

    space: Literal["latents", "pixels"]
    width: int
    classification: Classification | None
    triplets: TripletSet | None
    calibration: Calibration | None
    latents: Artifact | None
