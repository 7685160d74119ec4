"""The triangles that the rays of a camera hit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stages.optimize.cameras import Cameras

PAIRS = 2**18
"""About how many pairs of a ray and a triangle are tested at once."""
NEAR, MARGIN = 1e-4, 1e-6
"""If all corners of a triangle are at least NEAR in front of the camera, only the pixels in the bounding box of its
projection are tested. The box is MARGIN pixels wider on each side."""
SLACK = 1e-9
"""Tolerance of barycentric coordinates. A ray that passes a triangle this closely hits it, so that no ray slips between
two triangles."""


class Hits(NamedTuple):
    """Where the rays of K pixels hit triangles first."""

    pixels: Tensor
    """Numbers of the pixels, row by row, ascending, (K,)."""
    faces: Tensor
    """Numbers of the triangles, (K,)."""
    weights: Tensor
    """Barycentric coordinates: the weights of the triangle's corners at the hit, which sum to 1, (K, 3)."""
    distances: Tensor
    """From the camera, (K,)."""


@torch.no_grad()
def first_hits(corners: Tensor, camera: Cameras, side: int) -> Hits:
    """Return what the side^2 pixels of one camera see of triangles (F, 3, 3). Triangles are visible from both sides.

    Each ray is tested against the triangles whose projected bounding box holds its pixel, by the formulas of Möller and
    Trumbore (1997). Use float64: in float32, rays slip between the small triangles of a fine mesh."""
    (origin,), (directions,) = camera.rays(side)
    directions = directions.reshape(-1, 3)
    # All rays have the same origin. So the terms of the formulas are dot products of a ray's direction with three
    # vectors of the triangle, which are computed once.
    first, along, across = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    offset = origin - first
    normal, turned = torch.linalg.cross(across, along), torch.linalg.cross(offset, along)
    planes = torch.stack([normal, torch.linalg.cross(across, offset), turned], 1)
    heights = (across * turned).sum(-1)

    def meet(faces: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether the triangles are hit (P,), weights (P, 3) and distances (P,)."""
        scale, second, third = torch.einsum("pij,pj->ip", planes[faces], directions[pixels])
        weights = torch.stack([scale - second - third, second, third], -1) / scale[:, None]
        distances = heights[faces] / scale
        return (weights >= -SLACK).all(-1) & (distances > 0), weights, distances

    nearest = torch.full_like(directions[:, 0], torch.inf)
    seen = torch.full_like(nearest, len(corners), dtype=torch.long)
    for faces, pixels in _candidates(corners, camera, side):
        hit, _, distances = meet(faces, pixels)
        faces, pixels, distances = faces[hit], pixels[hit], distances[hit]
        before, nearest = nearest, nearest.scatter_reduce(0, pixels, distances, "amin")
        seen[nearest < before] = len(corners)
        found = (distances == nearest[pixels]) & (distances < before[pixels])
        seen.scatter_reduce_(0, pixels[found], faces[found], "amin")  # at equal distances, the first in the file
    (pixels,) = (seen < len(corners)).nonzero(as_tuple=True)
    _, weights, distances = meet(seen[pixels], pixels)
    return Hits(pixels, seen[pixels], weights, distances)


def _candidates(corners: Tensor, camera: Cameras, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of triangles (P,) and pixels (P,), which together are all pairs that may be hits."""
    (matrix,) = camera.to_world()
    local = (corners - matrix[:3, 3]) @ matrix[:3, :3]
    ahead = -local[..., 2]
    reach = (camera.field_of_view.deg2rad() / 2).tan() * ahead.clamp_min(NEAR)
    places = (torch.stack([local[..., 0], -local[..., 1]], -1) / reach[..., None] + 1) * (side / 2) - 0.5
    low = (places.amin(1) - MARGIN).ceil().clamp(0, side).long()
    high = (places.amax(1) + MARGIN).floor().clamp(-1, side - 1).long()
    crossing = (ahead < NEAR).any(1)  # the projection has no bounding box
    low[crossing], high[crossing] = 0, side - 1
    width, height = (high - low + 1).clamp_min(0).unbind(-1)
    counts = torch.where((ahead > 0).any(1), width * height, 0)
    (faces,) = counts.nonzero(as_tuple=True)
    chunks = (counts[faces].cumsum(0) // PAIRS).unique_consecutive(return_counts=True)[1]
    for some in faces.split(chunks.tolist()):
        own = counts[some]
        chosen = some.repeat_interleave(own)
        place = torch.arange(len(chosen), device=own.device) - (own.cumsum(0) - own).repeat_interleave(own)
        row = place.div(width[chosen], rounding_mode="floor")
        yield chosen, (low[chosen, 1] + row) * side + low[chosen, 0] + place - row * width[chosen]
