"""Triplets of a set, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stages.data.images.labelled import LabelledImages
from stages.data.triplets.bapps import BappsTriplets
from stages.data.triplets.config import Bapps, Synthetic, TripletSet
from stages.data.triplets.synthetic import SyntheticTriplets

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


def load(config: TripletSet, images: Callable[[bool], LabelledImages], *, held_out: bool) -> Triplets:
    """What is calibrated on, or with `held_out` what is measured on. `images(held_out)` are those that a synthetic set
    is made of; any other never asks for them. Raises StageError for what cannot be read."""
    if isinstance(config, Bapps):
        return BappsTriplets(config, held_out)
    if isinstance(config, Synthetic):
        return SyntheticTriplets(config, images(held_out), held_out)
    raise TypeError(f"{type(config).__name__} is no known set of triplets")
