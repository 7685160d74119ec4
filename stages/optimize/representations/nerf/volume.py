"""Nerf: particles that are radiance fields, and the volume rendering that shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages.networks.adapter import Adapter
from stages.optimize.representations.base import Look, Solid, Views
from stages.optimize.representations.nerf.field import Field

if TYPE_CHECKING:
    from stages.optimize.representations.nerf.config import NerfConfig

CHUNK = 2**16
"""Approximate number of samples that are rendered together in evaluation mode."""


class Nerf(Solid):
    """Radiance fields, one for each particle.

    In training, memory grows with the samples on all rays that meet the unit ball. The default settings keep about 750
    bytes for each sample: 64 for each level of the hash grid, 4 for each unit of a hidden layer, and 110 for the rest.
    In evaluation mode, rays are rendered in chunks, and memory grows with the image only.
    """

    config: NerfConfig

    def __init__(self, teacher: Adapter, count: int, config: NerfConfig) -> None:
        super().__init__(teacher, count, config)
        self.fields = nn.ModuleList(Field(config) for _ in range(count)).to(teacher.device)

    def look(self, views: Views, side: int) -> Look:
        assert views.cameras
        parameter = next(self.fields.parameters())
        origins, directions = (part.to(parameter) for part in views.cameras.rays(side))
        origins = origins[:, None, None].expand_as(directions)
        rows, seen = [], []
        for number in views.particles.unique().tolist():
            own = (views.particles == number).nonzero()[:, 0].to(parameter.device)
            rows.append(own)
            seen.append(self._rays(number, origins[own].reshape(-1, 3), directions[own].reshape(-1, 3)))
        images = torch.cat(seen).view(-1, side, side, 5)[torch.cat(rows).argsort()].permute(0, 3, 1, 2)
        colour, opacity, depth = images.split([3, 1, 1], 1)
        return Look(colour + (1 - opacity) * self.background(colour), opacity, depth, self._terms(opacity))

    def _rays(self, number: int, origins: Tensor, directions: Tensor) -> Tensor:
        """Return colour, opacity and depth on rays through one particle, (R, 5)."""
        rays = len(origins) if self.training else max(1, CHUNK // self.config.samples)
        pieces = zip(origins.split(rays), directions.split(rays), strict=True)
        return torch.cat([march(self.fields[number], *piece, self.config.samples, self.training) for piece in pieces])

    def _terms(self, opacity: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss terms of opacity, as in threestudio. Terms with the weight 0 are left out."""
        terms = {}
        if self.config.sparsity:
            terms["sparsity"] = self.config.sparsity * (opacity.square() + 0.01).sqrt().mean((1, 2, 3))
        if self.config.opaque:
            share = opacity.clamp(1e-3, 1 - 1e-3)
            entropy = -share * share.log() - (1 - share) * (1 - share).log()
            terms["opaque"] = self.config.opaque * entropy.mean((1, 2, 3))
        return terms


def march(
    field: Callable[[Tensor], tuple[Tensor, Tensor]], origins: Tensor, directions: Tensor, samples: int, random: bool
) -> Tensor:
    """Render a field inside the unit ball along rays: colour without background, opacity and depth, (R, 5).

    `field`: a function from positions (N, 3) to density (N,) and colour (N, 3). `origins`, `directions`: (R, 3),
    directions of length 1. The chord of a ray in the ball is divided into `samples` even parts. The field is evaluated
    at one position of each part, a random one or the middle. A ray that misses the ball gives zeros."""
    near, far = chord(origins, directions)
    hit = (far > near).nonzero()[:, 0]
    edges, distances = strata(near[hit], far[hit], samples, random)
    positions = origins[hit, None] + distances[..., None] * directions[hit, None]
    density, colour = field(positions.flatten(0, 1))
    colour, opacity, depth = composite(density.view_as(distances), colour.view_as(positions), edges)
    found = torch.cat([colour, opacity[:, None], depth[:, None]], 1)
    return found.new_zeros(len(origins), 5).index_copy(0, hit, found)


def chord(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances (...) at which rays (..., 3) enter and leave the unit ball. Neither is below 0.

    Directions have length 1. The two distances are equal where a ray misses the ball."""
    middle = -(origins * directions).sum(-1)
    closest = origins + middle[..., None] * directions
    half = (1 - closest.square().sum(-1)).clamp_min(0).sqrt()
    return (middle - half).clamp_min(0), (middle + half).clamp_min(0)


def strata(near: Tensor, far: Tensor, samples: int, random: bool) -> tuple[Tensor, Tensor]:
    """Divide the way from `near` to `far` (R,) into even parts. Return their edges (R, samples + 1), and a distance in
    each part (R, samples): uniformly random, by torch's global generator, or the middle."""
    width = ((far - near) / samples)[:, None]
    edges = near[:, None] + width * torch.arange(samples + 1).to(near)
    return edges, edges[:, :-1] + width * (torch.rand_like(edges[:, 1:]) if random else 0.5)


def composite(density: Tensor, colour: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up what each part of a ray sends to the camera (NeRF, 2003.08934, eq. 3).

    `density`: (R, S), for the S parts of each ray. `colour`: (R, S, 3). `edges`: the distances at which the parts begin
    and end, (R, S + 1). The paper uses the distances between neighbouring samples instead. Returns

    - colour (R, 3) = sum_i w_i colour_i, with w_i = T_i (1 - exp(-density_i width_i)) and
      T_i = product over j < i of exp(-density_j width_j)
    - opacity (R,) = sum_i w_i, the share of light that is stopped
    - depth (R,) = sum_i w_i middle_i / opacity, the mean distance at which light is stopped; 0 where opacity is 0"""
    stopping = density * edges.diff()
    weights = torch.exp(stopping - stopping.cumsum(-1)) * -torch.expm1(-stopping)
    opacity = weights.sum(-1)
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    depth = (weights * middles).sum(-1) / opacity.clamp_min(torch.finfo(opacity.dtype).eps)
    return (weights[..., None] * colour).sum(-2), opacity, depth
