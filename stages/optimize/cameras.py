"""Cameras around an object: their positions, the rays of their pixels, and the words for their views.

The object is within the unit ball around the origin. z points up. A camera at azimuth 0 is at +x and sees the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.optimize.representations.config import VIEWS

if TYPE_CHECKING:
    from stages.optimize.representations.config import CameraRange

OVERHEAD, FRONT = 60.0, 45.0
"""In degrees, as in threestudio. A view is `overhead` if its elevation is above OVERHEAD. Otherwise it is `front` or
`back` if its azimuth is less than FRONT away from that of the front or back. All other views are `side`."""


@dataclass(frozen=True)
class Cameras:
    """B cameras that look at the origin. All fields are (B,), float32."""

    azimuth: Tensor
    """Degrees, counter-clockwise from above."""
    elevation: Tensor
    """Degrees above the horizon, from -90 to 90."""
    distance: Tensor
    """Distance from the origin."""
    field_of_view: Tensor
    """Degrees, from the top to the bottom of the image."""

    def __len__(self) -> int:
        return len(self.azimuth)

    def at(self, rows: Tensor) -> Cameras:
        """Return the cameras at `rows`, row numbers (N,)."""
        return Cameras(self.azimuth[rows], self.elevation[rows], self.distance[rows], self.field_of_view[rows])

    @classmethod
    def draw(cls, count: int, among: CameraRange) -> Cameras:
        """Draw random cameras. Each setting is uniform over its range in `among`."""

        def uniform(least: float, most: float) -> Tensor:
            return least + (most - least) * torch.rand(count)

        return cls(
            *(uniform(*bounds) for bounds in (among.azimuth, among.elevation, among.distance, among.field_of_view))
        )

    @classmethod
    def spread(cls, count: int, among: CameraRange) -> Cameras:
        """Return `count` cameras spread evenly over the azimuths of `among`, in the middle of its other ranges.

        If the azimuths are a full circle, the first camera sees the front."""
        least, most = among.azimuth
        parts = torch.arange(count) + (0.0 if most - least >= 360 else 0.5)
        azimuth = (0.0 if most - least >= 360 else least) + min(most - least, 360.0) / count * parts
        rest = (torch.full((count,), sum(ends) / 2) for ends in (among.elevation, among.distance, among.field_of_view))
        return cls(azimuth, *rest)

    def to_world(self) -> Tensor:
        """Return the matrices from camera to world, (B, 4, 4). A camera looks along its -z, y is up, as in OpenGL."""
        azimuth, elevation = self.azimuth.deg2rad(), self.elevation.deg2rad()
        zero = torch.zeros_like(azimuth)
        flat = elevation.cos()
        backward = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], -1)
        right = torch.stack([-azimuth.sin(), azimuth.cos(), zero], -1)
        up = torch.linalg.cross(backward, right)
        matrix = torch.eye(4).to(azimuth).repeat(len(self), 1, 1)
        matrix[:, :3] = torch.stack([right, up, backward, backward * self.distance[:, None]], -1)
        return matrix

    def rays(self, side: int) -> tuple[Tensor, Tensor]:
        """Return origins (B, 3), and unit directions (B, side, side, 3) through the centres of the pixels.

        The first row of pixels is the upper one."""
        matrix = self.to_world()
        reach = (self.field_of_view.deg2rad() / 2).tan()
        steps = (torch.arange(side).to(reach) + 0.5) / side * 2 - 1
        down, across = torch.meshgrid(steps, steps, indexing="ij")
        plane = torch.stack([across, -down, torch.zeros_like(down)], -1)
        local = plane * reach[:, None, None, None] - torch.tensor([0.0, 0.0, 1.0]).to(reach)
        turned = (matrix[:, None, None, :3, :3] * local[..., None, :]).sum(-1)  # autocast would round an einsum
        return matrix[:, :3, 3], torch.nn.functional.normalize(turned, dim=-1)

    def prompts(self, prompt: str) -> list[str]:
        """Return `prompt` followed by the words for each view, such as `, side view` (2209.14988, section 3.2)."""
        words = []
        for azimuth, elevation in zip(self.azimuth.tolist(), self.elevation.tolist(), strict=True):
            off = abs((azimuth + 180) % 360 - 180)
            view = "front" if off < FRONT else "back" if off > 180 - FRONT else "side"
            words.append(VIEWS["overhead" if elevation > OVERHEAD else view].format(prompt))
        return words
