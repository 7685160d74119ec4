"""Six families of distortions whose strength is known: what synthetic triplets are made with.

Each takes an image (3, H, W) uint8, a strength in (0, 1] and a generator, and gives an image of the same shape. A
strength is one physical quantity in every draw, in proportion; lengths are relative to the width. Draws differ.
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
"""Standard deviation of the strongest blur over the width."""
NOISE = 64.0
"""Standard deviation of the strongest noise, in levels of 255."""
WARP = 1 / 16
"""Root mean square displacement of the strongest warp over the width."""
WARP_SCALE = 1 / 8
"""Standard deviation of the Gaussian that smooths a warp's displacements, over the width."""
SHIFT = 1 / 8
"""Distance of the longest shift over the width."""
HUE, TINT, CONTRAST = math.pi / 2, 64.0, 1.0
"""The strongest change of colour, were it of one kind: radians, levels of 255, powers of two."""
QUANTISER = 8.0
"""Steps of the coarsest JPEG over those of quality 50; the library's quality is then 6."""
BLOCK = 16
"""Pixels after which JPEG's grid repeats, its colours having half the resolution."""


def blur(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Gaussian blur. Strength: the root mean square of its two axes' standard deviations, which a draw shares out."""
    angle = generator.uniform(math.pi / 12, math.pi * 5 / 12)
    sigma = strength * BLUR * image.shape[2] * math.sqrt(2.0)
    pixels = ndimage.correlate1d(image.astype(np.float64), _bell(sigma * math.sin(angle)), axis=1, mode="reflect")
    return _levels(ndimage.correlate1d(pixels, _bell(sigma * math.cos(angle)), axis=2, mode="reflect"))


def noise(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """White Gaussian noise. Strength: its standard deviation."""
    return _levels(image + strength * NOISE * generator.standard_normal(image.shape))


def warp(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Pixels displaced by a smooth random field of mean zero. Strength: the root mean square displacement."""
    shape, width = image.shape[1:], image.shape[2]
    smooth = [
        ndimage.gaussian_filter(generator.standard_normal(shape), WARP_SCALE * width, mode="wrap") for _ in range(2)
    ]
    field = np.stack([one - one.mean() for one in smooth])
    field *= strength * WARP * width / np.sqrt(np.square(field).sum(0).mean())
    return _displaced(image, field)


def shift(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """The whole moved. Strength: the distance."""
    return moved(image, strength * SHIFT, generator)


def colour(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """Hue rotated about the grey axis, a tint added, contrast changed. Strength: the length of the three changes
    together, each in units of its own strongest; a draw is a direction."""
    turn, tint, contrast = strength * _direction(generator)
    tints = tint * TINT * math.sqrt(3.0) * _direction(generator)
    pixels = np.einsum("ij,jhw->ihw", _rotation(turn * HUE), image.astype(np.float64))
    middle = pixels.mean((1, 2), keepdims=True)
    return _levels(middle + tints[:, None, None] + (pixels - middle) * 2.0 ** (contrast * CONTRAST))


def compression(image: Image, strength: float, generator: np.random.Generator) -> Image:
    """JPEG. Strength: the scale of its quantisers (1 / QUANTISER is quality 50), not rounded to a whole quality. A draw
    is where its grid lies."""
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
    """The whole moved by `distance` times the width in a random direction, borders reflected."""
    angle = generator.uniform(0.0, 2.0 * math.pi)
    direction = np.array([math.sin(angle), math.cos(angle)])
    return _displaced(image, distance * image.shape[2] * direction[:, None, None])


def _displaced(image: Image, displacement: NDArray[np.float64]) -> Image:
    """Each pixel taken from where `displacement` (2, H or 1, W or 1) points. By cubic splines: linear interpolation
    would also blur, by an amount that depends on the fraction of a pixel and not on the strength."""
    rows, columns = np.mgrid[: image.shape[1], : image.shape[2]]
    places = np.stack([rows, columns]) + displacement
    channels = image.astype(np.float64)
    return _levels(np.stack([ndimage.map_coordinates(c, places, order=3, mode="reflect") for c in channels]))


def _bell(sigma: float) -> NDArray[np.float64]:
    """The discrete Gaussian kernel exp(-s^2) I_n(s^2) (Lindeberg 1990). Its variance is s^2 also below a pixel, where
    samples of the continuous one would all but vanish."""
    reach = math.ceil(4.0 * sigma) + 1
    weights: NDArray[np.float64] = special.ive(np.arange(-reach, reach + 1), sigma**2)
    return weights / weights.sum()


def _direction(generator: np.random.Generator) -> NDArray[np.float64]:
    """A unit vector (3,), uniform on the sphere."""
    vector = generator.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _rotation(angle: float) -> NDArray[np.float64]:
    """Of RGB about the grey axis (Rodrigues' formula): grey stays as it is."""
    axis = np.ones(3) / math.sqrt(3.0)
    across = np.cross(np.eye(3), axis)
    return math.cos(angle) * np.eye(3) - math.sin(angle) * across + (1.0 - math.cos(angle)) * np.outer(axis, axis)


@cache
def _quantisers() -> list[NDArray[np.int64]]:
    """Quality 50's tables, of brightness and of colour: the examples of the JPEG standard, annex K."""
    from PIL import Image as Pillow
    from PIL.JpegImagePlugin import JpegImageFile

    buffer = BytesIO()
    Pillow.new("RGB", (8, 8)).save(buffer, format="JPEG", quality=50)
    with Pillow.open(buffer, formats=("JPEG",)) as opened:
        assert isinstance(opened, JpegImageFile)
        return [np.array(table) for table in opened.quantization.values()]


def _levels(pixels: NDArray[np.float64]) -> Image:
    return pixels.round().clip(0, 255).astype(np.uint8)
