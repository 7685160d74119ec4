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

    training: TrainingSettings = Field(description="how trunk and classifier are optimised")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="after each of the head's hidden layers, as in VGG; hinders narrow networks"
    )
    mirror: bool = Field(
        False, description="mirror half of the images: not where left and right matter, as they do to digits"
    )


class CalibrationTraining(TrainingSettings):
    """How the heads are optimised: by default as LPIPS's own script does it (Zhang et al. 2018, 1801.03924), with Adam
    at 1e-4, constant for half of the steps and then falling linearly; theirs are some 30,000 steps of 50 triplets.
    Unlike there the gradient is clipped and weights are averaged, as everywhere here."""

    batch_size: int = Field(50, ge=1, description="triplets a batch; a step sees `accumulate` times as many")
    learning_rate: float = Field(1e-4, gt=0, description="its peak: after the warm-up, before the decay")
    decay: Literal["constant", "cosine", "linear"] = Field(
        "linear", description="of the learning rate: none, half a cosine, or over the second half linearly to zero"
    )
    betas: tuple[float, float] = Field(
        (0.5, 0.999), strict=False, description="Adam's decay of its averages of gradients and of their squares"
    )


class Calibration(Config):
    """The heads' training: weights of channels with which distances agree with judgements of which of two distorted
    images is the closer one."""

    training: CalibrationTraining = Field(description="how the heads are optimised")
    dropout: float = Field(0.5, ge=0, lt=1, description="of squared differences, before they are weighted")


@dataclass(frozen=True)
class Recipe:
    """What a `perceptual` stage asks for; None for what a network taken from elsewhere needs none of."""

    space: Literal["latents", "pixels"]
    width: int
    classification: Classification | None
    triplets: TripletSet | None
    calibration: Calibration | None
    latents: Artifact | None
