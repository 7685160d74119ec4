"""`kind: perceptual`: trains the network of a perceptual loss, for a teacher's latents or for pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import SCRATCH, Artifact, Choice, Content, Input, Stage, StageContext
from stages.data.triplets.config import TRIPLET_SETS, TripletSet
from stages.latents import Latents
from stages.perceptual.config import Calibration, Classification, Recipe
from stages.training import TrainingExecution
from stages.training.players import training_progress

SMALLEST = 32
"""Smallest side of an image in pixels: VGG's five poolings reduce it to one."""


class Perceptual(Stage):
    """Trains and tests the network of LatentLPIPS (Kang et al. 2024, 2405.05967, section 3.1). First, a VGG-16 learns
    to classify latents. Then weights of its channels are fitted to judgements of similarity. With `from`, an existing
    network is used instead.

    `space: pixels` trains the network on images instead of latents, with all poolings of VGG-16. Use it if the weights
    of the lpips package cannot be downloaded.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["perceptual"]
    latents: Annotated[str | None, Input("latents")] = Field(
        None, description="encoded images to train on; the network is for their latent space"
    )
    from_: Annotated[str | None, Content(files=("perceptual.json", "network.safetensors"))] = Field(
        None, alias="from", description="folder that `retort import-weights` wrote, used in place of training"
    )
    space: Literal["latents", "pixels"] = Field("latents", description="input of the network")
    width: int = Field(
        64,
        ge=4,
        description="channels of the first block; the others have 2, 4, 8 and 8 times as many, and VGG-16 has 64",
    )
    classification: Classification | None = Field(
        None, description="how the trunk is trained; if left out, its weights stay random"
    )
    triplets: Annotated[TripletSet, Choice("name", TRIPLET_SETS)] | None = Field(
        None, description="judgements to calibrate and test on"
    )
    calibration: Calibration | None = Field(None, description="how the heads are trained")
    execution: TrainingExecution = Field(
        TrainingExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    def _is_given(self, name: str) -> bool:
        """Whether a setting has another value than its default."""
        return getattr(self, name) != type(self).model_fields[name].default

    @model_validator(mode="after")
    def _trained_or_taken(self) -> Self:
        if self.from_ is None:
            missing = [name for name in ("latents", "triplets", "calibration") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"{' and '.join(missing)} missing: give them to train a network, or give `from`")
        elif given := [name for name in ("classification", "calibration", "width") if self._is_given(name)]:
            raise ValueError(f"a network `from` a folder is not trained: leave {' and '.join(sorted(given))} out")
        elif self.latents and not self.triplets:
            raise ValueError("a network `from` a folder uses latents only for a test: give triplets, or no latents")
        elif self.triplets and not self.latents:
            raise ValueError("a test on triplets needs latents: their teacher's VAE encodes the triplets")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        latents = inputs["latents"].stage if self.latents else None
        if self.classification and isinstance(latents, Latents) and not latents.images.labelled:
            yield "classification", f"the images of {self.latents}, {latents.images.name}, have no classes"
        if (
            self.classification
            and self.space == "pixels"
            and isinstance(latents, Latents)
            and latents.images.size < SMALLEST
        ):
            yield (
                "space",
                f"pixels: images of {latents.images.size} pixels are too small for five poolings; give at least "
                f"{SMALLEST}",
            )

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        latents = context.inputs.get("latents")
        recipe = Recipe(self.space, self.width, self.classification, self.triplets, self.calibration, latents)
        if self.from_:
            return context.run(_adopt, Path(self.from_), recipe, self.execution, context.output, context.threads)
        return context.run(_train, recipe, self.execution, context.seed, context.output, context.threads)


def _train(*arguments: Any) -> Any:
    from stages.perceptual.train import train_perceptual

    return train_perceptual(*arguments)


def _adopt(*arguments: Any) -> Any:
    from stages.perceptual.train import adopt_perceptual

    return adopt_perceptual(*arguments)
