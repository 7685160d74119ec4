"""`kind: perceptual`: the network through which a perceptual loss looks, in a teacher's latent space or in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import SCRATCH, Artifact, Choice, Config, Content, Input, Stage, StageContext
from stages.data.triplets.config import TRIPLET_SETS, TripletSet
from stages.latents import Latents
from stages.methods.base import TrainingExecution, TrainingSettings, training_progress


SMALLEST = 32
"""Pixels a side that VGG's five poolings leave anything of."""


class Classification(Config):
    """The trunk's training: cross-entropy over the classes of the images, summed over labels where they have several.

    The paper trains on ImageNet and does not say how (2405.05967); this recipe is our own: AdamW, images shifted by
    up to 1/16 of their side with reflected borders.
    """

    training: TrainingSettings = Field(description="how trunk and classifier are optimised")
    mirror: bool = Field(
        False, description="mirror half of the images: not where left and right matter, as they do to digits"
    )


class CalibrationTraining(TrainingSettings):
    """How the heads are optimised: by default as LPIPS's own (Zhang et al. 2018, 1801.03924, appendix), Adam at 1e-4,
    constant for half of the steps and then falling linearly. Theirs are 30,000 of 50 triplets."""

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


class Perceptual(Stage):
    """Train a VGG-16 to classify latents, weight its channels by judgements of likeness, and test it (LatentLPIPS, Kang
    et al. 2024, 2405.05967, section 3.1). Or take one with `from`.

    `space: pixels` trains the same network on the images themselves, with all its pools: the reference where the
    weights of the lpips package cannot be had.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["perceptual"]
    latents: Annotated[str | None, Input("latents")] = Field(
        None, description="encoded images: what is learnt from, and whose latent space the network is for"
    )
    from_: Annotated[str | None, Content(files=("perceptual.json", "network.safetensors"))] = Field(
        None, alias="from", description="instead of training: a folder that `retort import-weights` wrote"
    )
    space: Literal["latents", "pixels"] = Field("latents", description="what the network looks at")
    width: int = Field(64, ge=4, description="channels of the first block, a quarter of the third's; VGG's are 64")
    classification: Classification | None = Field(
        None, description="how the trunk is trained; none: it stays random, which is recorded as such"
    )
    triplets: Annotated[TripletSet, Choice("name", TRIPLET_SETS)] | None = Field(
        None, description="judgements that it is calibrated and tested on: synthetic, or BAPPS"
    )
    calibration: Calibration | None = Field(None, description="how the heads are trained")
    execution: TrainingExecution = Field(TrainingExecution(), description="how it is carried out; makes nothing stale")

    @model_validator(mode="after")
    def _trained_or_taken(self) -> Self:
        if self.from_ is None:
            missing = [name for name in ("latents", "triplets", "calibration") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: what is not taken `from` a folder is trained")
        elif self.classification or self.calibration:
            raise ValueError(
                "a network is either taken `from` a folder or trained, with classification and calibration"
            )
        elif self.triplets and not self.latents:
            raise ValueError("to be tested on triplets it needs latents: they say with which VAE triplets are encoded")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        latents = inputs["latents"].stage if self.latents else None
        if self.classification and isinstance(latents, Latents) and not latents.images.labelled:
            yield "classification", f"the images of {self.latents}, {latents.images.name}, have no classes"
        if self.space == "pixels" and isinstance(latents, Latents) and latents.images.size < SMALLEST:
            yield (
                "space",
                f"pixels: five poolings leave nothing of images of {latents.images.size}; {SMALLEST} at least",
            )

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        function = _adopt if self.from_ else _train
        return context.run(function, self, context.inputs.get("latents"), context.seed, context.output, context.threads)


def _train(*arguments: Any) -> Any:
    from stages.perception import train_perceptual

    return train_perceptual(*arguments)


def _adopt(*arguments: Any) -> Any:
    from stages.perception import adopt_perceptual

    return adopt_perceptual(*arguments)
