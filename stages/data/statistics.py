"""Summaries of arrays that can be merged: moments and histograms, kept in float64."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.base import Config

BINS = 96
EDGES = np.linspace(-6.0, 6.0, BINS + 1)
"""Histogram edges; values outside fall into the first or last bin."""
NORMAL = np.array([NormalDist().cdf(edge) for edge in EDGES[1:-1]])


MOST = 2**53
"""The largest count that a float64 still tells from its neighbour."""


class Moments(Config):
    """Count, mean, sum of squared deviations and largest magnitude of the finite values; how many are not finite."""

    count: int = Field(0, ge=0, le=MOST)
    mean: float = 0.0
    m2: float = Field(0.0, ge=0)
    absmax: float = Field(0.0, ge=0)
    nonfinite: int = Field(0, ge=0, le=MOST)

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        flat = values.astype(np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        lost = flat.size - finite.size
        if not finite.size:
            return cls(nonfinite=lost)
        mean = float(finite.mean())
        deviations = float(np.square(finite - mean).sum())
        return cls(count=finite.size, mean=mean, m2=deviations, absmax=float(np.abs(finite).max()), nonfinite=lost)

    def merge(self, other: Moments) -> Moments:
        """Chan, Golub and LeVeque 1979: exact up to rounding, in any order."""
        count, nonfinite = self.count + other.count, self.nonfinite + other.nonfinite
        if count == 0:
            return Moments(nonfinite=nonfinite)
        delta = other.mean - self.mean
        return Moments.model_construct(
            count=count,
            mean=self.mean + delta * other.count / count,
            m2=self.m2 + other.m2 + delta * delta * self.count * other.count / count,
            absmax=max(self.absmax, other.absmax),
            nonfinite=nonfinite,
        )

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        return reduce(cls.merge, parts, cls())

    @property
    def std(self) -> float:
        return (self.m2 / self.count) ** 0.5 if self.count else 0.0


def histogram(values: NDArray[Any]) -> list[int]:
    """Counts between EDGES; the sum is the number of finite values."""
    flat = values.astype(np.float64).ravel()
    flat = np.clip(flat[np.isfinite(flat)], EDGES[0], EDGES[-1])
    # equal bins: an index instead of a search, which is what a shard's cost of writing is made of
    places = np.minimum(((flat - EDGES[0]) * (BINS / (EDGES[-1] - EDGES[0]))).astype(np.int64), BINS - 1)
    counts: list[int] = np.bincount(places, minlength=BINS).tolist()
    return counts


def ks_distance(counts: NDArray[np.int64]) -> float | None:
    """The Kolmogorov-Smirnov distance D = sup |F(x) - Phi(x)| of a histogram to N(0, 1), the supremum taken over the
    inner EDGES. No p-value: of millions of values every difference is significant. None for no values."""
    total = counts.sum()
    return float(np.abs(np.cumsum(counts)[:-1] / total - NORMAL).max()) if total else None
