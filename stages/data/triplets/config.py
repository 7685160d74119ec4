"""Sets of triplets for two-alternative forced choice, as a manifest names them. Imports no NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from stages.base import Config, Content
from stages.data.triplets.families import Family
from stages.registry import Registry

if TYPE_CHECKING:
    from stages.data.images.labelled import LabelledImages
    from stages.data.triplets.triplets import Triplets

Category = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class TripletSet(Config):
    """A reference and two distorted images, many times over, with the share of people who find the second closer."""

    name: str

    def load(self, images: Callable[[bool], LabelledImages], held_out: bool) -> Triplets:
        """What is calibrated on, or with `held_out` what is measured on. `images(held_out)` are those that a synthetic
        set is made of; any other never asks for them. Raises StageError for what cannot be read."""
        raise TypeError(f"{type(self).__name__} does not say how it is loaded")


class Bapps(TripletSet):
    """BAPPS, people's judgements (Zhang et al. 2018, 1801.03924), as its own script unpacks it:
    PATH/train/CATEGORY and PATH/val/CATEGORY, each with ref, p0, p1 (NAME.png) and judge (NAME.npy)."""

    name: Literal["bapps"] = "bapps"
    path: Annotated[str, Content()] = Field(description="folder that holds train and val, such as dataset/2afc")
    train: list[Category] = Field(
        ["traditional", "cnn", "mix"], min_length=1, description="folders below train to calibrate on"
    )
    test: list[Category] = Field(
        ["traditional", "cnn", "superres", "deblur", "color", "frameinterp"],
        min_length=1,
        description="folders below val to measure on",
    )

    def load(self, images: Callable[[bool], LabelledImages], held_out: bool) -> Triplets:
        from stages.data.triplets.bapps import BappsTriplets

        return BappsTriplets(self.path, self.train, self.test, held_out)

    @field_validator("train", "test")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a category is given twice")
        return value


class Synthetic(TripletSet):
    """No judgements of people: distortions of known strength, made of real images. Both images of a triplet are of one
    family, in independent draws, and the weaker distortion is the closer one. Reports call it synthetic, never BAPPS.

    One family is for testing only, so that what is learned is tried on a distortion it never saw. By default that is
    warp: of digit scenes, squared error of pixels sides with the wrong image in 22%, and a classifier's features that
    were calibrated on the other families in 19% (difference 0.031 +- 0.006). It would tell less of noise, where squared
    error is seldom wrong, and of colour, where it is partly a matter of definition which change is the larger. Without
    misalignment squared error is wrong in 10%, and calibration teaches nothing that helps (-0.005 +- 0.005).
    """

    name: Literal["synthetic"] = "synthetic"
    count: int = Field(
        20_000, ge=50, description="number of triplets to calibrate on, of all families except the held-out one"
    )
    test_count: int = Field(
        2_000, ge=10, description="number of triplets to measure on, for each family, of held-out images"
    )
    held_out_family: Family = Field("warp", description="family that is measured on only")
    ratio: tuple[float, float] = Field(
        (0.5, 0.9),
        strict=False,
        description="range of the weaker strength divided by the stronger; values near 1 are hard to tell apart",
    )
    misalignment: float = Field(
        1 / 32,
        ge=0,
        le=0.25,
        description="each image is first shifted by up to this share of its width; the judgement ignores it, so a "
        "good distance must too; triplets of the family shift are not moved",
    )

    def load(self, images: Callable[[bool], LabelledImages], held_out: bool) -> Triplets:
        from stages.data.triplets.synthetic import SyntheticTriplets

        return SyntheticTriplets(
            images(held_out),
            self.test_count if held_out else self.count,
            held_out=held_out,
            held_out_family=self.held_out_family,
            ratio=self.ratio,
            misalignment=self.misalignment,
        )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.ratio
        if not 0.0 < low <= high < 1.0:
            raise ValueError(f"ratio must rise and lie between 0 and 1, such as [0.5, 0.9], not [{low}, {high}]")
        return self


TRIPLET_SETS: Registry[TripletSet] = Registry(
    "retort.triplet_sets", TripletSet, "name", {"bapps": Bapps, "synthetic": Synthetic}
)
