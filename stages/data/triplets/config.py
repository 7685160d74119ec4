"""Settings of sets of triplets for two-alternative forced choice. Imports no NumPy."""

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
    """Triplets of a reference and two distorted images, each with the share of people who chose the second image as the
    closer one."""

    name: str

    def load(self, images: Callable[[bool], LabelledImages], held_out: bool) -> Triplets:
        """Return the triplets to calibrate on, or with `held_out` the triplets to test on.

        `images(held_out)` loads the images that synthetic triplets are made from; other sets do not call it. Raises
        StageError for files that cannot be read.
        """
        raise TypeError(f"{type(self).__name__} does not implement load()")


class Bapps(TripletSet):
    """BAPPS, a dataset of human judgements of image similarity (Zhang et al. 2018, 1801.03924). The folder has the
    layout that its download script makes: PATH/train/CATEGORY and PATH/val/CATEGORY, each with ref, p0, p1 (NAME.png)
    and judge (NAME.npy)."""

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
    """Triplets without human judgements: real images with distortions of known strength. Both distorted images of a
    triplet are independent draws of one family. By definition, the image with the weaker distortion is closer. Reports
    call these triplets synthetic, never BAPPS.

    One family is used only for testing, so that the test has a distortion that calibration never used. The default is
    warp. On digit scenes, the mean squared error of pixels chooses the wrong image in 22% of the warped triplets, and
    features of a classifier, calibrated on the other families, in 19% (difference 0.031 +- 0.006). Other families are a
    weaker test: for noise, squared error is seldom wrong, and for colour, it is partly a matter of definition which
    change is larger. Without misalignment, squared error is wrong in 10%, and calibration does not help (-0.005 +-
    0.005).
    """

    name: Literal["synthetic"] = "synthetic"
    count: int = Field(
        20_000, ge=50, description="number of triplets to calibrate on, of all families except the held-out one"
    )
    test_count: int = Field(
        2_000, ge=10, description="number of test triplets of each family, made from held-out images"
    )
    held_out_family: Family = Field("warp", description="family that is used only for tests")
    ratio: tuple[float, float] = Field(
        (0.5, 0.9),
        strict=False,
        description="range of the weaker strength divided by the stronger; values near 1 are hard to tell apart",
    )
    misalignment: float = Field(
        1 / 32,
        ge=0,
        le=0.25,
        description="each image is first shifted by up to this share of its width, except in the family shift; the "
        "judgement ignores this shift, so a good distance must ignore it too",
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
