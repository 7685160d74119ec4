"""Two-alternative forced choice: how often a distance sides with people on which of two images is the closer one.

The score of Zhang et al. 2018 (1801.03924); NumPy only. Votes are the share of people who took the second image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]


def scores(first: Numbers, second: Numbers, votes: Numbers) -> NDArray[np.float64]:
    """Of each triplet (N,), the share of people who agree with a distance that gives the two images `first` and
    `second`; 1/2 where it cannot tell them apart. Raises ValueError for distances that are not numbers, and lengths
    that differ."""
    if not first.shape == second.shape == votes.shape:
        raise ValueError(f"first distances {first.shape}, second ones {second.shape} and votes {votes.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a distance is not a number")
    p = votes.astype(np.float64)
    return np.where(second < first, p, np.where(first < second, 1.0 - p, 0.5))


def human_ceiling(votes: Numbers) -> float:
    """How often two people agree: the mean of p^2 + (1 - p)^2. A distance that always sides with the majority gets
    more, the mean of max(p, 1 - p)."""
    p = votes.astype(np.float64)
    return float((p**2 + (1.0 - p) ** 2).mean())


def score_with_error(scores: Numbers) -> tuple[float, float]:
    """The mean and its standard error, triplets being independent. Raises ValueError for fewer than two."""
    if len(scores) < 2:
        raise ValueError(f"a standard error needs at least two triplets, not {len(scores)}")
    values = scores.astype(np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def difference_with_error(scores: Numbers, others: Numbers) -> tuple[float, float]:
    """By how much one distance scores higher than another on the same triplets, and the standard error of that: what
    makes a triplet hard for both cancels. Raises ValueError for fewer than two, and lengths that differ."""
    if len(scores) != len(others):
        raise ValueError(f"{len(scores)} triplets against {len(others)}: they must be the same ones")
    return score_with_error(scores.astype(np.float64) - others.astype(np.float64))
