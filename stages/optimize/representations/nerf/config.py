"""The settings of `representation: nerf`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.optimize.config import RepresentationMaterials
from stages.optimize.representations.config import SolidConfig

if TYPE_CHECKING:
    from stages.optimize.representations.base import Representation


class NerfConfig(SolidConfig):
    """A radiance field: a small network gives the density and the colour at each position in the unit ball.

    The colour does not depend on the direction, and there is no light: a surface has one colour from all sides. The
    defaults are small enough for a laptop. For large images on a GPU, use for example levels: 12, log2_table_size: 19,
    finest: 1024, hidden: 64 and samples: 128.
    """

    name: Literal["nerf"] = "nerf"
    encoding: Literal["hash", "frequency"] = Field(
        "hash",
        description="encoding of a position; hash: trained features on grids (Instant NGP, 2201.05989); frequency: "
        "sines and cosines (NeRF, 2003.08934), which give smoother fields but need a larger network",
    )
    levels: int = Field(
        8,
        ge=1,
        le=24,
        description="number of hash grids, each finer than the one before; with frequency: number of octaves",
    )
    features: int = Field(2, ge=1, le=16, description="features of a vertex of a grid; not with frequency")
    log2_table_size: int = Field(
        14,
        ge=4,
        le=24,
        description="log2 of the largest number of vertices that a grid stores; in finer grids, vertices share "
        "features by a hash; not with frequency",
    )
    coarsest: int = Field(
        8,
        ge=1,
        le=4096,
        description="cells of the first grid along a side of the cube around the ball; not with frequency",
    )
    finest: int = Field(128, ge=1, le=4096, description="cells of the last grid along a side; not with frequency")
    hidden: int = Field(32, ge=1, description="width of the hidden layers of the network")
    layers: int = Field(1, ge=1, description="hidden layers of the network")
    samples: int = Field(
        32,
        ge=1,
        description="number of samples on each ray inside the ball; the ray is divided into as many equal parts; the "
        "sample of a part is at a random position in training, and in the middle otherwise",
    )
    blob: float = Field(
        10.0,
        ge=0,
        description="density in the middle before training, from which it falls linearly to 0 (Magic3D, 2211.10440); "
        "with 0, training starts from a thin fog, and often no object forms",
    )
    blob_radius: float = Field(0.5, gt=0, le=1, description="distance from the middle at which the blob ends")
    sparsity: float = Field(
        1e-3,
        ge=0,
        description="weight of the mean of sqrt(opacity^2 + 0.01) over the pixels, which removes fog; threestudio's "
        "weight of 1 for Stable Diffusion corresponds to 6e-5 here, because Retort averages the teacher's loss over "
        "the elements of latents",
    )
    opaque: float = Field(
        0.0, ge=0, description="weight of the mean entropy of opacity over the pixels, which drives opacity to 0 or 1"
    )

    def check(self) -> Iterator[tuple[str, str]]:
        if self.encoding == "hash" and self.coarsest > self.finest:
            yield "coarsest", f"{self.coarsest} is above finest: {self.finest}"

    def create(self, materials: RepresentationMaterials) -> Representation:
        from stages.optimize.representations.nerf.volume import Nerf

        return Nerf(materials.teacher, materials.particles, self)
