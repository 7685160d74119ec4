"""Moments (in float64) and histograms of arrays. Those of several arrays can be merged."""

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
"""Bin edges of histograms. Values outside of them are counted in the first or last bin."""
SCALE_EDGES = np.linspace(0.0, 24.0, BINS + 1)
"""Bin edges of the histogram of `guidance_scale`."""
NORMAL = np.array([NormalDist().cdf(edge) for edge in EDGES[1:-1]])


MOST = 2**53
"""The largest allowed count: up to it, float64 represents every integer exactly."""


class Moments(Config):
    """Count, mean, sum of squared deviations (`m2`) and largest magnitude of the finite values of an array.

    `nonfinite` counts the other values.
    """

    count: int = Field(0, ge=0, le=MOST)
    mean: float = 0.0
    m2: float = Field(0.0, ge=0)
    absmax: float = Field(0.0, ge=0)
    nonfinite: int = Field(0, ge=0, le=MOST)

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Return the moments of all values of an array of any shape."""
        flat = values.astype(np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        lost = flat.size - finite.size
        if not finite.size:
            return cls(nonfinite=lost)
        mean = float(finite.mean())
        deviations = float(np.square(finite - mean).sum())
        return cls(count=finite.size, mean=mean, m2=deviations, absmax=float(np.abs(finite).max()), nonfinite=lost)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both arrays together, exact up to rounding (Chan, Golub and LeVeque 1979)."""
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
        """The population standard deviation; 0 without finite values."""
        return (self.m2 / self.count) ** 0.5 if self.count else 0.0


def edges_of(name: str) -> NDArray[np.float64]:
    """Return the bin edges of the histogram of the array `name`."""
    return SCALE_EDGES if name == "guidance_scale" else EDGES


def histogram(values: NDArray[Any], edges: NDArray[np.float64] = EDGES) -> list[int]:
    """Count the finite values in each bin. `edges` (BINS + 1,) are evenly spaced."""
    flat = values.astype(np.float64).ravel()
    flat = np.clip(flat[np.isfinite(flat)], edges[0], edges[-1])
    # bins are equal, so the index is computed: a search would dominate the time to write a shard
    places = np.minimum(((flat - edges[0]) * (BINS / (edges[-1] - edges[0]))).astype(np.int64), BINS - 1)
    counts: list[int] = np.bincount(places, minlength=BINS).tolist()
    return counts


def ks_distance(counts: NDArray[np.int64]) -> float | None:
    """Return the Kolmogorov-Smirnov distance of a histogram to N(0, 1): max |F(x) - Phi(x)| over the inner EDGES.

    None if the histogram is empty. There is no p-value: for millions of values, every difference is significant.
    """
    total = counts.sum()
    return float(np.abs(np.cumsum(counts)[:-1] / total - NORMAL).max()) if total else None
