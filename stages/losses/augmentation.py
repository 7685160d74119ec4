"""The random transformations of E-LatentLPIPS: drawn for each sample, applied alike to both inputs of a distance.

Kang et al. 2024, 2405.05967, section 3.1, with the transformations of ADA (Karras et al. 2020, 2006.06676, appendix
B), each at probability one, and of DiffAugment (Zhao et al. 2020, 2006.10738). Groups:

- `b`, pixel blitting: mirroring, a turn by a multiple of 90 degrees, a shift by whole pixels of up to 1/8 of the side;
- `g`, geometry: isotropic scaling, rotation, anisotropic scaling, rotation, a fractional shift;
- `c`, colour: brightness, contrast and saturation;
- `o`, cutout: a square of half the side, set to zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = "bgco"

SHIFT = 0.125
"""Of the side: the largest whole-pixel shift, and the fractional shift's standard deviation."""
LOG2_SCALE = 0.2
"""Standard deviation of the base-2 logarithm of both scalings."""
BRIGHTNESS, CONTRAST, SATURATION = 0.5, 0.5, 1.0
"""Half-widths: an addend about 0, and factors about 1."""
HOLE = 0.5
"""Side of the square that is cut out, of the image's."""

UP = (-0.091271763114, -0.057543526229, 0.591271763114, 1.115087052457)
DOWN = (0.026748757411, -0.016864118443, -0.078223266529, 0.266864118443, 0.602949018236)
"""Halves of the low-pass filters of Cohen, Daubechies and Feauveau's 9/7 wavelet, which is symmetric: doubling the
resolution and halving it again gives back the input, and what lies beyond a border mirrors what lies before it, as
with the sym6 of ADA it would not without wide margins."""
REACH = len(DOWN) - 1
"""Of the halving filter, in pixels of the doubled image to each side."""


class Draw(NamedTuple):
    """One transformation a sample; None for a group that is left out."""

    grid: Tensor | None
    """(B, h, w, 2): where each point of the output lies in the input, as `grid_sample` wants it."""
    colour: Tensor | None
    """(B, 3): brightness, contrast, saturation."""
    hole: Tensor | None
    """(B, 2): the middle of the square (x, y), in [0, 1]."""


class Augmentation(nn.Module):
    """Transforms batches (B, C, H, W), H and W at least 3. Differentiable in them; borders are reflected.

    `b` alone moves whole pixels. With `g` the image is doubled by a wavelet, sampled bilinearly and halved again, so
    that scaling and turning do not alias. Raises ValueError for groups that are not among `bgco`.
    """

    def __init__(self, groups: str) -> None:
        super().__init__()
        if not groups or set(groups) - set(GROUPS) or len(set(groups)) < len(groups):
            raise ValueError(f"augmentation groups are some of {GROUPS}, not {groups!r}")
        self.groups = groups
        up, down = torch.tensor([*UP, *UP[-2::-1]]), torch.tensor([*DOWN, *DOWN[-2::-1]])
        between, at = up[0::2], functional.pad(up[1::2], (0, 1))
        phases = torch.stack([torch.outer(y, x) for y in (at, between) for x in (at, between)])
        self._up: Tensor
        self._down: Tensor
        self.register_buffer("_up", phases[:, None], persistent=False)  # one filter for each pixel a pixel becomes
        self.register_buffer("_down", torch.outer(down, down)[None, None], persistent=False)

    def draw(self, x: Tensor) -> Draw:
        """A fresh transformation for each sample of `x`, from torch's generator of its device."""
        n, _, height, width = x.shape
        return Draw(
            grid=self._grid(self._matrix(n, height, width, x.device), height, width) if self._moves else None,
            colour=_colour(n, x.device) if "c" in self.groups else None,
            hole=torch.rand(n, 2, device=x.device) if "o" in self.groups else None,
        )

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        """`x` transformed, in its own dtype; in between all is float32, since bfloat16 cannot tell neighbouring
        places apart."""
        with torch.autocast(x.device.type, enabled=False):
            y = x.float()
            if draw.grid is not None:
                y = self._resample(y, draw.grid)
            if draw.colour is not None:
                y = _recolour(y, draw.colour)
            if draw.hole is not None:
                y = _cut_out(y, draw.hole)
            return y.to(x.dtype)

    @property
    def _moves(self) -> bool:
        return "b" in self.groups or "g" in self.groups

    def _matrix(self, n: int, height: int, width: int, device: torch.device) -> Tensor:
        """(B, 3, 3): from a point of the output to that of the input, in pixels from the middle."""
        matrix = torch.eye(3, device=device).expand(n, 3, 3)
        sides = torch.tensor([width, height], device=device)
        if "b" in self.groups:
            mirror, turn, *shift = torch.rand(4, n, device=device)
            matrix = matrix @ _scaling(1 - 2 * (mirror < 0.5).float(), torch.ones_like(mirror))
            matrix = matrix @ _rotation((4 * turn).floor() * (math.pi / 2))
            matrix = matrix @ _shift(((2 * torch.stack(shift, 1) - 1) * SHIFT * sides).round())
        if "g" in self.groups:
            scale, stretch, *shift = torch.randn(4, n, device=device)
            before, after = (2 * torch.rand(2, n, device=device) - 1) * math.pi
            scale, stretch = (2 ** (LOG2_SCALE * s) for s in (scale, stretch))
            matrix = matrix @ _scaling(1 / scale, 1 / scale)
            matrix = matrix @ _rotation(before) @ _scaling(1 / stretch, stretch) @ _rotation(after)
            matrix = matrix @ _shift(torch.stack(shift, 1) * SHIFT * sides)
        return matrix

    def _grid(self, matrix: Tensor, height: int, width: int) -> Tensor:
        """In units in which the middles of the outermost pixels are at -1 and 1; where the image is resampled, at
        twice the resolution and wider by the halving filter."""
        device, sides = matrix.device, (height, width)
        if "g" in self.groups:
            y, x = (torch.arange(-REACH, 2 * s - 1 + REACH, device=device) / 2 - (s - 1) / 2 for s in sides)
        else:  # a quarter past the middles: of an odd side turned upon an even one, all round the same way
            y, x = (torch.arange(s, device=device) - (s - 1) / 2 + 0.25 for s in sides)
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=device)
        columns = (matrix[:, :2] / half[:, None])[:, None, None].unbind(-1)  # three of (B, 1, 1, 2)
        return columns[0] * x[:, None] + (columns[1] * y[:, None, None] + columns[2])

    def _resample(self, x: Tensor, grid: Tensor) -> Tensor:
        if "g" not in self.groups:
            return functional.grid_sample(x, grid, mode="nearest", padding_mode="reflection", align_corners=True)
        n, channels, height, width = x.shape
        planes = functional.pad(x.reshape(n * channels, 1, height, width), (1, 2, 1, 2), "reflect")
        doubled = functional.pixel_shuffle(functional.conv2d(planes, self._up), 2)[..., :-1, :-1]
        doubled = doubled.reshape(n, channels, 2 * height - 1, 2 * width - 1)
        moved = functional.grid_sample(doubled, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
        halved = functional.conv2d(moved.reshape(n * channels, 1, *moved.shape[-2:]), self._down, stride=2)
        return halved.reshape(n, channels, height, width)


def _rows(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows((x, zero, zero), (zero, y, zero), (zero, zero, one))


def _rotation(angle: Tensor) -> Tensor:
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _rows((cos, -sin, zero), (sin, cos, zero), (zero, zero, one))


def _shift(by: Tensor) -> Tensor:
    zero, one = torch.zeros_like(by[:, 0]), torch.ones_like(by[:, 0])
    return _rows((one, zero, by[:, 0]), (zero, one, by[:, 1]), (zero, zero, one))


def _colour(n: int, device: torch.device) -> Tensor:
    around = 2 * torch.rand(n, 3, device=device) - 1
    half_widths = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION], device=device)
    return around * half_widths + torch.tensor([0.0, 1.0, 1.0], device=device)


def _recolour(x: Tensor, colour: Tensor) -> Tensor:
    """Contrast about the sample's own mean, saturation about each pixel's mean over channels."""
    brightness, contrast, saturation = colour[:, :, None, None, None].unbind(1)
    mean, grey = x.mean((1, 2, 3), keepdim=True), x.mean(1, keepdim=True)
    return mean + brightness + contrast * (grey - mean + saturation * (x - grey))


def _cut_out(x: Tensor, middle: Tensor) -> Tensor:
    _, _, height, width = x.shape
    across, down = ((torch.arange(s, device=x.device) + 0.5) / s for s in (width, height))
    in_x = (across - middle[:, :1]).abs() < HOLE / 2
    in_y = (down - middle[:, 1:]).abs() < HOLE / 2
    return x.masked_fill((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0)
