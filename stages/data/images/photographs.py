"""Crops of the colour photographs that are included in scikit-learn and scikit-image."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PHOTOGRAPHS = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/rocket.jpg",
)
HEIGHT = 192
"""Height in pixels that every photograph is scaled to. A crop of 32 pixels then shows a sixth of the height."""


@cache
def photograph(number: int) -> NDArray[np.float32]:
    """Return photograph `number` as (3, HEIGHT, W) in [0, 1]."""
    from PIL import Image

    package, _, inside = PHOTOGRAPHS[number].partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    with Image.open(Path(spec.origin).parent / inside) as image:
        rgb = image.convert("RGB")
        rgb = rgb.resize((round(rgb.width * HEIGHT / rgb.height), HEIGHT), Image.Resampling.LANCZOS)
    return np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1) / 255.0


def crop(number: int, size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Return a random square of photograph `number` as (3, size, size) in [0, 1], mirrored with probability 1/2."""
    whole = photograph(number)
    top = generator.integers(whole.shape[1] - size + 1)
    left = generator.integers(whole.shape[2] - size + 1)
    square = whole[:, top : top + size, left : left + size]
    return square[:, :, ::-1] if generator.integers(2) else square
