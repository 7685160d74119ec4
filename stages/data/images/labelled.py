"""The named record in which image sets travel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelledImages:
    """images: (N, 3, H, W) uint8, perhaps memory-mapped; captions: N strings; labels: name -> (N,) int64 classes."""

    images: NDArray[np.uint8]
    captions: list[str]
    labels: dict[str, NDArray[np.int64]]
    origins: NDArray[np.int64]
    """(N,): images with one number were made from one original, and are not independent."""

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: NDArray[np.int64]) -> LabelledImages:
        return LabelledImages(
            self.images[index],
            [self.captions[i] for i in index],
            {name: values[index] for name, values in self.labels.items()},
            self.origins[index],
        )

    def pixels(self, index: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """The images of `index` as networks want them."""
        return scaled(self.images[index])


def scaled(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images as networks want them: float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1.0
