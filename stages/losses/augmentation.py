"""The random transformations of E-LatentLPIPS. Each sample gets its own; both inputs of a distance get the same.

Source: Kang et al. 2024, 2405.05967, section 3.1. The transformations are those of ADA (Karras et al. 2020, 2006.06676,
appendix B), always applied, and of DiffAugment (Zhao et al. 2020, 2006.10738). Groups:

- `b`, pixel blitting: mirroring, rotation by a multiple of 90 degrees, a shift by whole pixels of up to 1/8 of the side
- `g`, geometry: isotropic scaling, rotation, anisotropic scaling, rotation, a fractional shift
- `c`, colour: brightness, contrast and saturation
- `o`, cutout: a square of half the side is set to zero
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = "bgco"

SHIFT = 0.125
"""Largest whole-pixel shift, and standard deviation of the fractional shift, relative to the side."""
LOG2_SCALE = 0.2
"""Standard deviation of the base-2 logarithm of the scale factors."""
BRIGHTNESS, CONTRAST, SATURATION = 0.5, 0.5, 1.0
"""Half-widths of the uniform distributions of brightness (added, centred at 0), contrast and saturation (factors,
centred at 1)."""
HOLE = 0.5
"""Side of the square that is cut out, relative to the image's side."""

UP = (-0.091271763114, -0.057543526229, 0.591271763114, 1.115087052457)
DOWN = (0.026748757411, -0.016864118443, -0.078223266529, 0.266864118443, 0.602949018236)
"""Halves of the symmetric low-pass filters of the CDF 9/7 wavelet (Cohen, Daubechies and Feauveau). Upsampling by 2 and
downsampling again returns the input. The filters are symmetric, so reflected borders stay reflected; the sym6
wavelet of ADA would need wide margins for that."""
REACH = len(DOWN) - 1
"""Half-width of the downsampling filter, in pixels of the upsampled image."""


class Draw(NamedTuple):
    """The random transformation of each sample of a batch. A field is None if its group is not used."""

    grid: Tensor | None
    """(B, h, w, 2): the position in the input of each output point, in the coordinates of `grid_sample`."""
    colour: Tensor | None
    """(B, 3): brightness, contrast and saturation."""
    hole: Tensor | None
    """(B, 2): the centre (x, y) of the square that is cut out, in [0, 1]."""


class Augmentation(nn.Module):
    """Transforms batches (B, C, H, W), with H and W at least 3. Differentiable in the input. Borders are reflected.

    Without `g`, pixels are moved without interpolation. With `g`, the image is upsampled by 2 with a wavelet, sampled
    bilinearly and downsampled again, so that scaling and rotation do not alias. Raises ValueError for groups that are
    not some of `bgco`.
    """

    def __init__(self, groups: str) -> None:
        super().__init__()
        if not groups or set(groups) - set(GROUPS) or len(set(groups)) < len(groups):
            raise ValueError(f"augmentation groups must be some of {GROUPS}, each once, not {groups!r}")
        self.groups = groups
        up, down = torch.tensor([*UP, *UP[-2::-1]]), torch.tensor([*DOWN, *DOWN[-2::-1]])
        between, on_pixels = up[0::2], functional.pad(up[1::2], (0, 1))
        phases = torch.stack([torch.outer(y, x) for y in (on_pixels, between) for x in (on_pixels, between)])
        self._up: Tensor
        self._down: Tensor
        # Upsampling turns each pixel into 4. There is a filter for each of them.
        self.register_buffer("_up", phases[:, None], persistent=False)
        self.register_buffer("_down", torch.outer(down, down)[None, None], persistent=False)

    def draw(self, x: Tensor) -> Draw:
        """Draw a transformation for each sample of `x`, from the torch generator of its device."""
        n, _, height, width = x.shape
        return Draw(
            grid=self._grid(self._matrix(n, height, width, x.device), height, width) if self._moves else None,
            colour=_colour(n, x.device) if "c" in self.groups else None,
            hole=torch.rand(n, 2, device=x.device) if "o" in self.groups else None,
        )

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        """Transform `x` (B, C, H, W); shape and dtype stay the same.

        Computes in float32, because bfloat16 cannot distinguish neighbouring pixel positions.
        """
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
        """Draw matrices (B, 3, 3) that map output points to input points, in pixels from the image centre."""
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
        """Return the sampling grid (B, h, w, 2). The centres of the outermost pixels are at -1 and 1.

        With group `g`, the grid has twice the resolution, and is REACH points wider on each side.
        """
        device, sides = matrix.device, (height, width)
        if "g" in self.groups:
            y, x = (torch.arange(-REACH, 2 * s - 1 + REACH, device=device) / 2 - (s - 1) / 2 for s in sides)
        else:  # offset by a quarter pixel, so that all points between two pixels are rounded in the same direction
            y, x = (torch.arange(s, device=device) - (s - 1) / 2 + 0.25 for s in sides)
        half = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=device)
        columns = (matrix[:, :2] / half[:, None])[:, None, None].unbind(-1)  # three tensors (B, 1, 1, 2)
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
    uniform = 2 * torch.rand(n, 3, device=device) - 1
    half_widths = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION], device=device)
    return uniform * half_widths + torch.tensor([0.0, 1.0, 1.0], device=device)


def _recolour(x: Tensor, colour: Tensor) -> Tensor:
    """Change brightness, contrast (about the sample's mean) and saturation (about each pixel's mean over channels)."""
    brightness, contrast, saturation = colour[:, :, None, None, None].unbind(1)
    mean, grey = x.mean((1, 2, 3), keepdim=True), x.mean(1, keepdim=True)
    return mean + brightness + contrast * (grey - mean + saturation * (x - grey))


def _cut_out(x: Tensor, middle: Tensor) -> Tensor:
    _, _, height, width = x.shape
    across, down = ((torch.arange(s, device=x.device) + 0.5) / s for s in (width, height))
    in_x = (across - middle[:, :1]).abs() < HOLE / 2
    in_y = (down - middle[:, 1:]).abs() < HOLE / 2
    return x.masked_fill((in_y[:, :, None] & in_x[:, None, :])[:, None], 0.0)
