"""Two-alternative forced choice (2AFC): how often a distance agrees with people on which of two images is closer.

Source: Zhang et al. 2018, 1801.03924. A vote is the share of people who chose the second image. Uses only NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating]


def scores(first: Numbers, second: Numbers, votes: Numbers) -> NDArray[np.float64]:
    """Return the score (N,) of a distance on each triplet: the share of people who agree with it, 1/2 for a tie.

    first, second: (N,), the distances of the first and second image to the reference. votes: (N,) in [0, 1]. Raises
    ValueError if the shapes differ or a distance is NaN.
    """
    if not first.shape == second.shape == votes.shape:
        raise ValueError(f"shapes differ: first {first.shape}, second {second.shape}, votes {votes.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a distance is NaN")
    p = votes.astype(np.float64)
    return np.where(second < first, p, np.where(first < second, 1.0 - p, 0.5))


def human_ceiling(votes: Numbers) -> float:
    """Return how often two people agree: the mean of p^2 + (1 - p)^2 over votes p.

    A distance that always agrees with the majority has a higher score, the mean of max(p, 1 - p).
    """
    p = votes.astype(np.float64)
    return float((p**2 + (1.0 - p) ** 2).mean())


def score_with_error(scores: Numbers) -> tuple[float, float]:
    """Return the mean score and its standard error for independent triplets. Raises ValueError for fewer than two."""
    if len(scores) < 2:
        raise ValueError(f"a standard error needs at least two triplets, not {len(scores)}")
    values = scores.astype(np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def difference_with_error(scores: Numbers, others: Numbers) -> tuple[float, float]:
    """Return how much higher one distance scores than another on the same triplets, and the standard error.

    The error is that of paired differences, so the shared difficulty of triplets cancels. Raises ValueError for fewer
    than two triplets, or if the lengths differ.
    """
    if len(scores) != len(others):
        raise ValueError(f"scores of {len(scores)} and {len(others)} triplets: both must be of the same triplets")
    return score_with_error(scores.astype(np.float64) - others.astype(np.float64))
