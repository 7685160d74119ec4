"""Splits real images into two sets that share no original."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from stages.base import StageError
from stages.data.images.labelled import LabelledImages
from stages.evaluate.config import MIN_SAMPLES


class RealSets(NamedTuple):
    """Two equally large sets of real images that share no original.

    All distances are measured to `reference`. `other` is measured like generated images, as a baseline.
    """

    reference: LabelledImages
    other: LabelledImages


def two_real_sets(images: LabelledImages, samples: int) -> RealSets:
    """Draw two random sets of equal size that share no original, with `samples` images each if there are enough.

    Every image of composed scenes counts as an original, although scenes share scans and photographs: the samples of a
    teacher share them, too. Raises StageError if a set has fewer than MIN_SAMPLES images.
    """
    generator = np.random.default_rng(0)
    known, original = np.unique(images.origins, return_inverse=True)
    in_first = generator.permutation(len(known)) < len(known) // 2
    index = generator.permutation(len(images))
    first, second = index[in_first[original[index]]], index[~in_first[original[index]]]
    n = min(samples, len(first), len(second))
    if n < MIN_SAMPLES:
        raise StageError(
            f"the probe holds out {len(images)} real images, which make two sets of {n}; distances need at least "
            f"{MIN_SAMPLES} in each. Raise the probe's `limit`, hold out more (images.hold_out_every), or give it more "
            "images"
        )
    return RealSets(images.take(first[:n]), images.take(second[:n]))
