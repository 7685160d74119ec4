"""The settings of the representations. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from stages.base import Config
from stages.optimize.config import RepresentationConfig, RepresentationMaterials

if TYPE_CHECKING:
    from stages.optimize.representations.base import Representation


VIEWS = {view: f"{{}}, {view} view" for view in ("front", "side", "back", "overhead")}
"""The prompt for each view of an object."""


def _within(least: float, most: float) -> AfterValidator:
    """Return a check of a range of uniform random numbers: it must lie within [least, most]."""

    def check(value: tuple[float, float]) -> tuple[float, float]:
        if not least <= value[0] <= value[1] <= most:
            raise ValueError(f"should be two numbers from {least:g} to {most:g}, the first not above the second")
        return value

    return AfterValidator(check)


class CameraRange(Config):
    """Positions of the random cameras. They look at the origin. The object is inside the unit ball around the
    origin."""

    azimuth: Annotated[tuple[float, float], Strict(False), _within(-360, 360)] = Field(
        (-180.0, 180.0), description="degrees around the object; 0 is its front"
    )
    elevation: Annotated[tuple[float, float], Strict(False), _within(-90, 90)] = Field(
        (-10.0, 45.0), description="degrees above the horizon"
    )
    distance: Annotated[tuple[float, float], Strict(False), _within(0.1, 100)] = Field(
        (2.5, 3.0), description="distance from the origin"
    )
    field_of_view: Annotated[tuple[float, float], Strict(False), _within(1, 170)] = Field(
        (40.0, 50.0), description="degrees from the top to the bottom of the image"
    )


class LatentConfig(RepresentationConfig):
    """Particles are latents of the teacher, as in threestudio's 2dplayground. They start as standard normal noise."""

    name: Literal["latent"] = "latent"

    def create(self, materials: RepresentationMaterials) -> Representation:
        from stages.optimize.representations.flat import Latents

        return Latents(materials.teacher, materials.particles)


class ImageConfig(RepresentationConfig):
    """Particles are images of the teacher's size, which its VAE encodes. They start as uniform noise over the range of
    images."""

    name: Literal["image"] = "image"

    def create(self, materials: RepresentationMaterials) -> Representation:
        from stages.optimize.representations.flat import Images

        return Images(materials.teacher, materials.particles)


class SolidConfig(RepresentationConfig):
    """Base class of objects that cameras see from all sides."""

    cameras: CameraRange = Field(CameraRange(), description="positions of the random cameras")
    view_prompts: bool = Field(
        True,
        description="whether `, front view` and so on is added to the prompt; set it to false if the teacher does not "
        "know these words",
    )
    resolution: int = Field(
        64,
        ge=8,
        description="side of the rendered images in training, in pixels; they are "
        "scaled to the size of the teacher's images",
    )
    shown: int = Field(128, ge=8, description="side of the images that are written, in pixels")

    background: Literal["white", "black", "grey", "random"] = Field(
        "random",
        description="colour behind the object; random: a new colour for each view in training, so that the object "
        "cannot blend into it, and grey otherwise",
    )

    def prompts(self, prompt: str) -> list[str]:
        return [view.format(prompt) for view in VIEWS.values()] if self.view_prompts else [prompt]
