"""The interface of all sets of triplets."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


class Triplets(Protocol):
    """N triplets: a reference image and two distorted images of it, all of one size."""

    votes: NDArray[np.float32]
    """(N,) in [0, 1]: the share of people who chose the second image as the closer one."""
    categories: dict[str, range]
    """Category -> the indices of its triplets. The ranges are in order and without gaps."""
    unseen: frozenset[str]
    """Categories that have no training triplets."""

    def batch(self, index: NDArray[np.int64]) -> tuple[Images, Images, Images]:
        """Return the references, first images and second images at `index`, each (B, 3, H, W) uint8.

        Raises StageError if an image cannot be read.
        """
