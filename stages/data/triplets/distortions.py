"""The six families of distortions of synthetic triplets.

Each function takes an image (3, H, W) uint8, a strength in (0, 1] and a random generator. It returns an image of the
same shape. The strength is proportional to one physical quantity of the family, which is equal in all draws of that
strength. Lengths are relative to the width of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from stages.data.triplets.families import Family

Image = NDArray[np.uint8]
Distortion = Callable[[Image, float, np.random.Generator], Image]

BLUR = 1 / 16
"""Standard deviation of the strongest blur, relative to the width."""
NOISE = 64.0
"""Standard deviation of the strongest noise, in pixel levels (0 to 255)."""
WARP = 1 / 16
"""Root mean square displacement of the strongest warp, relative to the width."""
WARP_SCALE = 1 / 8
"""Standard deviation of the Gaussian that smooths a warp's displacements, relative to the width."""
SHIFT = 1 / 8
"""Distance of the longest shift, relative to the width."""
HUE, TINT, CONTRAST = math.pi / 2, 64.0, 1.0
"""The strongest change of each kind alone: hue in radians, tint in pixel levels (0 to 255), contrast in powers of 2."""
QUANTISER = 8.0
"""Quantisation steps of the strongest JPEG compression, relative to those of quality 50. It is about quality 6."""
BLOCK = 16
"""Period of JPEG's block grid in pixels: twice 8, because colour is stored at half the resolution."""


def blur(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Gaussian blur. Strength: the root mean square of the standard deviations of both axes; their ratio is random."""
    angle = generator.uniform(math.pi / 12, math.pi * 5 / 12)
    sigma = strength * BLUR * image.shape[2] * math.sqrt(2.0)
    pixels = ndimage.correlate1d(image.astype(np.float64), _bell(sigma * math.sin(angle)), axis=1, mode="reflect")
    return _levels(ndimage.correlate1d(pixels, _bell(sigma * math.cos(angle)), axis=2, mode="reflect"))


def noise(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """White Gaussian noise. Strength: the standard deviation."""
    return _levels(image + strength * NOISE * generator.standard_normal(image.shape))


def warp(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Displace pixels by a smooth random field of mean zero. Strength: the root mean square displacement."""
    shape, width = image.shape[1:], image.shape[2]
    smooth = [
        ndimage.gaussian_filter(generator.standard_normal(shape), WARP_SCALE * width, mode="wrap") for _ in range(2)
    ]
    field = np.stack([one - one.mean() for one in smooth])
    field *= strength * WARP * width / np.sqrt(np.square(field).sum(0).mean())
    return _displaced(image, field)


def shift(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Shift the whole image in a random direction. Strength: the distance."""
    return moved(image, strength * SHIFT, generator)


def colour(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Rotate the hue about the grey axis, add a tint, and change the contrast.

    Strength: the length of the vector of the three changes, each divided by its strongest value. Its direction is
    random.
    """
    turn, tint, contrast = strength * _direction(generator)
    tints = tint * TINT * math.sqrt(3.0) * _direction(generator)
    pixels = np.einsum("ij,jhw->ihw", _rotation(turn * HUE), image.astype(np.float64))
    middle = pixels.mean((1, 2), keepdims=True)
    return _levels(middle + tints[:, None, None] + (pixels - middle) * 2.0 ** (contrast * CONTRAST))


def compression(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """JPEG compression. Strength: the scale of the quantisation tables; 1 / QUANTISER corresponds to quality 50.

    The offset of the block grid is random.
    """
    from PIL import Image as Pillow

    top, left = generator.integers(BLOCK, size=2)
    padded = np.pad(image, ((0, 0), (top, 0), (left, 0)), mode="symmetric").transpose(1, 2, 0)
    scaled = [(table * strength * QUANTISER).round().clip(1, 255).astype(int).tolist() for table in _quantisers()]
    buffer = BytesIO()
    Pillow.fromarray(padded).save(buffer, format="JPEG", qtables=scaled)
    with Pillow.open(buffer, formats=("JPEG",)) as opened:
        return np.ascontiguousarray(np.asarray(opened, dtype=np.uint8)[top:, left:].transpose(2, 0, 1))


DISTORTIONS: dict[Family, Distortion] = {
    "blur": blur,
    "noise": noise,
    "warp": warp,
    "shift": shift,
    "colour": colour,
    "compression": compression,
}


def moved(image: Image, distance: float, generator: np.random.Generator) -> Image:
    """Shift an image by `distance` times its width in a random direction. Borders are reflected."""
    angle = generator.uniform(0.0, 2.0 * math.pi)
    direction = np.array([math.sin(angle), math.cos(angle)])
    return _displaced(image, distance * image.shape[2] * direction[:, None, None])


def _displaced(image: Image, displacement: NDArray[np.float64]) -> Image:
    """Read each pixel at its position plus `displacement` (2, H or 1, W or 1), in pixels, with cubic splines.

    Linear interpolation would add a blur that depends on the fraction of a pixel instead of the strength.
    """
    rows, columns = np.mgrid[: image.shape[1], : image.shape[2]]
    places = np.stack([rows, columns]) + displacement
    channels = image.astype(np.float64)
    return _levels(np.stack([ndimage.map_coordinates(c, places, order=3, mode="reflect") for c in channels]))


def _bell(sigma: float) -> NDArray[np.float64]:
    """Return the discrete Gaussian kernel exp(-s^2) I_n(s^2), for s = `sigma` in pixels (Lindeberg 1990).

    Its variance is s^2 for any s. A sampled continuous Gaussian has almost no variance for s well below 1.
    """
    reach = math.ceil(4.0 * sigma) + 1
    weights: NDArray[np.float64] = special.ive(np.arange(-reach, reach + 1), sigma**2)
    return weights / weights.sum()


def _direction(generator: np.random.Generator) -> NDArray[np.float64]:
    """Return a random unit vector (3,), uniform on the sphere."""
    vector = generator.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _rotation(angle: float) -> NDArray[np.float64]:
    """Return the rotation (3, 3) of RGB about the grey axis (Rodrigues' formula). `angle` is in radians."""
    axis = np.ones(3) / math.sqrt(3.0)
    across = np.cross(np.eye(3), axis)
    return math.cos(angle) * np.eye(3) - math.sin(angle) * across + (1.0 - math.cos(angle)) * np.outer(axis, axis)


@cache
def _quantisers() -> list[NDArray[np.int64]]:
    """Return the quantisation tables of quality 50, for brightness and colour (JPEG standard, annex K)."""
    from PIL import Image as Pillow
    from PIL.JpegImagePlugin import JpegImageFile

    buffer = BytesIO()
    Pillow.new("RGB", (8, 8)).save(buffer, format="JPEG", quality=50)
    with Pillow.open(buffer, formats=("JPEG",)) as opened:
        assert isinstance(opened, JpegImageFile)
        return [np.array(table) for table in opened.quantization.values()]


def _levels(pixels: NDArray[np.float64]) -> Image:
    return pixels.round().clip(0, 255).astype(np.uint8)
