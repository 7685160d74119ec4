"""The interface in which triplets travel, whichever set they are of."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


class Triplets(Protocol):
    """N triplets of a reference and two distorted images of one size."""

    votes: NDArray[np.float32]
    """(N,) in [0, 1]: the share of people who took the second for the closer one."""
    categories: dict[str, range]
    """Name -> the places of its triplets. In order, without gaps."""
    unseen: frozenset[str]
    """Categories that no training triplet is of."""

    def batch(self, index: NDArray[np.int64]) -> tuple[Images, Images, Images]:
        """The references, first and second images at places `index`, each (B, 3, H, W). Raises StageError."""
