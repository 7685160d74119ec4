"""Summaries of arrays that can be merged: moments and histograms, kept in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGES = np.linspace(-6.0, 6.0, 97)
"""Histogram edges; values outside fall into the first or last bin."""


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations and largest magnitude of all values seen."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    absmax: float = 0.0

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Moments:
        flat = values.astype(np.float64).ravel()
        mean = float(flat.mean())
        return cls(flat.size, mean, float(np.square(flat - mean).sum()), float(np.abs(flat).max()))

    def merge(self, other: Moments) -> Moments:
        """Chan, Golub and LeVeque 1979: exact up to rounding, in any order."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.m2 + other.m2 + delta * delta * self.count * other.count / count,
            max(self.absmax, other.absmax),
        )

    @property
    def std(self) -> float:
        return (self.m2 / self.count) ** 0.5 if self.count else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2, "absmax": self.absmax}


def histogram(values: NDArray[np.floating]) -> list[int]:
    """Counts between EDGES; the sum is the number of values."""
    flat = np.clip(values.astype(np.float64).ravel(), EDGES[0], EDGES[-1])
    return [int(n) for n in np.histogram(flat, EDGES)[0]]
