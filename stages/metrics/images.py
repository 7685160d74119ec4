"""Figures of a set of images (N, 3, H, W) in [-1, 1], without a network. Uses only NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.floating]

LUMA = (0.2126, 0.7152, 0.0722)
"""The weights of red, green and blue in the luma of Rec. 709."""


def saturation(images: Images) -> NDArray[np.float64]:
    """Return the mean HSV saturation of each image, (N,), in [0, 1].

    The saturation of a pixel is (max - min) / max of its three channels, and 0 if the pixel is black."""
    values = (images.astype(np.float64) + 1) / 2
    most, least = values.max(1), values.min(1)
    mean: NDArray[np.float64] = np.where(most > 0, (most - least) / np.maximum(most, 1e-9), 0.0).mean((1, 2))
    return mean


def contrast(images: Images) -> NDArray[np.float64]:
    """Return the RMS contrast: the standard deviation of the luma in [0, 1] over each image, (N,)."""
    luma = np.einsum("c,nchw->nhw", LUMA, (images.astype(np.float64) + 1) / 2)
    deviation: NDArray[np.float64] = luma.std((1, 2))
    return deviation


def distance(images: Images, groups: NDArray[np.int64]) -> float | None:
    """Return the mean distance of two images of a group: the root mean squared difference of their values.

    groups: (N,). None if no group has two images."""
    flat = images.astype(np.float64).reshape(len(images), -1)
    found = [
        np.sqrt(np.square(flat[i] - flat[i + 1 :][groups[i + 1 :] == groups[i]]).mean(1)) for i in range(len(images))
    ]
    every = np.concatenate(found)
    return float(every.mean()) if len(every) else None
