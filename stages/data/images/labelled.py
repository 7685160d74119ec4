"""The record that holds the images of an image set, with their captions and labels."""

from __future__ import annotations

from dataclasses import dataclass

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

    def pixels(self, index: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Return the images at `index` as float32 in [-1, 1], (B, 3, H, W)."""
        return scaled(self.images[index])


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 images in 0 to 255 to float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
