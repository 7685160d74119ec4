"""Settings of the training of a perceptual network. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from stages.base import Artifact, Config
from stages.data.triplets.config import TripletSet
from stages.training import TrainingSettings


class Classification(Config):
    """The trunk's training: cross-entropy over the classes of the images, summed over labels where they have several.

    The paper trains on ImageNet and does not say how (2405.05967); this recipe is our own: AdamW, images shifted by
    up to 1/16 of their side, in whole pixels, with reflected borders (latents of fewer than 16 a side: not at all).
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
    """How the heads are optimised: by default as LPIPS's own script does it (Zhang et al. 2018, 1801.03924), with Adam
    at 1e-4, constant for half of the steps and then falling linearly; theirs are some 30,000 steps of 50 triplets.
    Unlike there the gradient is clipped and weights are averaged, as everywhere here."""

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
    """The heads' training: weights of channels with which distances agree with judgements of which of two distorted
    images is the closer one."""

    training: CalibrationTraining = Field(description="how the heads are trained")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="dropout of the squared differences, before the heads weight them"
    )


@dataclass(frozen=True)
class Recipe:
    """What a `perceptual` stage asks for; None for what a network taken from elsewhere needs none of."""

    space: Literal["latents", "pixels"]
    width: int
    classification: Classification | None
    triplets: TripletSet | None
    calibration: Calibration | None
    latents: Artifact | None
