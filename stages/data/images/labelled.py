"""The record that holds the images of an image set, with their captions and labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelledImages:
    """Images with captions and class labels.

    images: (N, 3, H, W) uint8 in 0 to 255, possibly memory-mapped. captions: N strings. labels: name -> (N,) int64
    class numbers from 0.
    """

    images: NDArray[np.uint8]
    captions: list[str]
    labels: dict[str, NDArray[np.int64]]
    origins: NDArray[np.int64]
    """(N,): the number of the original that each image was made from. Images with equal numbers are not independent."""

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: NDArray[np.int64]) -> LabelledImages:
        """Return the images at `index`, with their captions, labels and origins."""
        return LabelledImages(
            self.images[index],
            [self.captions[i] for i in index],
            {name: values[index] for name, values in self.labels.items()},
            self.origins[index],
        )

    def upscaled(self, share: float, seed: int) -> LabelledImages:
        """Return the images with a random `share` of them scaled to half their size and up again.

        Halving averages 2x2 pixels. Doubling repeats them and smooths the edges, which is bilinear interpolation."""
        if not share:
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[: round(share * len(self))]
        images = np.array(self.images)
        images[chosen] = doubled(halved(images[chosen]))
        return replace(self, images=images)

    def pixels(self, index: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Return the images at `index` as float32 in [-1, 1], (B, 3, H, W)."""
        return scaled(self.images[index])


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 images in 0 to 255 to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0


def halved(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Average 2x2 pixels of images (N, 3, H, W) with even sides: (N, 3, H/2, W/2), 0 to 255."""
    number, channels, height, width = images.shape
    blocks = images.reshape(number, channels, height // 2, 2, width // 2, 2)
    mean: NDArray[np.float32] = blocks.mean((3, 5), dtype=np.float32)
    return mean


def doubled(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale images (N, 3, H, W), 0 to 255, to twice their size by bilinear interpolation."""
    for axis in (2, 3):
        near = np.repeat(images, 2, axis)
        before = np.concatenate([near.take([0], axis), near.take(range(near.shape[axis] - 1), axis)], axis)
        after = np.concatenate([near.take(range(1, near.shape[axis]), axis), near.take([-1], axis)], axis)
        images = near / 2 + (before + after) / 4
    return images.round().astype(np.uint8)
