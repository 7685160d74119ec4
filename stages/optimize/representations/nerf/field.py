"""The network of a radiance field: density and colour at positions, and the encodings of positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from operator import add, mul, xor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from stages.optimize.representations.nerf.config import NerfConfig

PRIMES = 1, 2654435761, 805459861
"""The factors of the coordinates in the hash of a vertex (2201.05989, eq. 4)."""


class Field(nn.Module):
    """Density and colour at positions in the unit ball."""

    def __init__(self, config: NerfConfig) -> None:
        super().__init__()
        self.blob, self.blob_radius = config.blob, config.blob_radius
        self.encoding = HashGrid(config) if config.encoding == "hash" else Frequencies(config.levels)
        widths = [self.encoding.width] + [config.hidden] * config.layers
        hidden = [layer for ends in pairwise(widths) for layer in (nn.Linear(*ends), nn.ReLU())]
        self.network = nn.Sequential(*hidden, nn.Linear(config.hidden, 4))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return density (N,) >= 0 and colour (N, 3) in [0, 1] at positions (N, 3).

        density = softplus(network + blob (1 - |position| / blob_radius)), and 0 outside the ball. Density is the share
        of light that is stopped, for each unit of length. The blob is that of Magic3D (2211.10440)."""
        output = self.network(self.encoding(positions)).to(positions.dtype)
        radius = positions.norm(dim=-1)
        density = functional.softplus(output[:, 0] + self.blob * (1 - radius / self.blob_radius))
        return density * (radius <= 1), output[:, 1:].sigmoid()


class Frequencies(nn.Module):
    """Sines and cosines of the coordinates times 2^k pi, for k below `octaves` (NeRF, 2003.08934, eq. 4)."""

    factors: Tensor

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.width = 6 * octaves
        self.register_buffer("factors", 2.0 ** torch.arange(octaves), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Encode positions (N, 3) as (N, width)."""
        angles = math.pi * (positions[:, :, None] * self.factors).flatten(1)
        return torch.cat([angles.sin(), angles.cos()], 1)


class HashGrid(nn.Module):
    """Features on the vertices of grids over the cube [-1, 1]^3 (Instant NGP, 2201.05989, section 3).

    The number of cells along a side grows geometrically from `coarsest` to `finest`. Features are interpolated
    linearly along each axis. If a grid has more vertices than its table has entries, a hash gives each vertex an entry,
    and vertices share entries.
    """

    strides: Tensor

    def __init__(self, config: NerfConfig) -> None:
        super().__init__()
        growth = (config.finest / config.coarsest) ** (1 / max(config.levels - 1, 1))
        self.cells = [round(config.coarsest * growth**level) for level in range(config.levels)]
        """The number of cells along a side, for each level."""
        self.width = config.levels * config.features
        most = 2**config.log2_table_size
        sizes = [min((cells + 1) ** 3, most) for cells in self.cells]
        self.hashed = [(cells + 1) ** 3 > most for cells in self.cells]
        strides = [
            PRIMES if hashed else (1, cells + 1, (cells + 1) ** 2)
            for cells, hashed in zip(self.cells, self.hashed, strict=True)
        ]
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.tables = nn.ParameterList(torch.empty(config.features, size).uniform_(-1e-4, 1e-4) for size in sizes)
        """The features, (features, entries) for each level. The entry of a vertex is the sum of its coordinates times
        `strides`, modulo the number of entries. Hashed levels use the exclusive or in place of the sum."""

    def forward(self, positions: Tensor) -> Tensor:
        """Encode positions (N, 3) as (N, width). Positions outside the cube are clamped to it."""
        places = ((positions.t() + 1) / 2).clamp(0, 1)
        return torch.cat([self._level(level, places) for level in range(len(self.cells))]).t()

    def _level(self, level: int, places: Tensor) -> Tensor:
        """Interpolate the features of one level at `places` (3, N) in [0, 1], (features, N)."""
        table, cells, stride = self.tables[level], self.cells[level], self.strides[level][:, None]
        scaled = places * cells
        low = scaled.floor().clamp(max=cells - 1)
        part = scaled - low
        terms = low.long() * stride
        terms = torch.stack([terms, terms + stride])
        if self.hashed[level]:
            corners = _corners(terms.bitwise_and(table.shape[1] - 1).int(), xor)
        else:
            corners = _corners(terms.int(), add)
        shares = _corners(torch.stack([1 - part, part]), mul)
        found = [entries.index_select(0, corners.flatten()).view_as(shares) for entries in table]  # faster than by rows
        return torch.stack([(feature * shares).sum(0) for feature in found])


def _corners(ends: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return a value for each of the 8 corners of a cell, (8, N).

    `ends` (2, 3, N) has a value for both ends of the cell along each axis. A corner is one end along each axis. Its
    value is that of these three ends, combined by `join`."""
    x, y, z = ends.unbind(1)
    return join(join(x[:, None, None], y[:, None]), z).flatten(0, 2)
