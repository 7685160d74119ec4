"""The order in which training draws samples. It is a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stages.data.shares import BLOCK


class ShuffledOrder:
    """Draws batches of indices in epochs. Each epoch is a new random permutation, and no index is dropped.

    sources: the number of indices, or several ranges of indices. Each range has its own epochs. Its share of the draws
    is its share of `weights` (default: the ranges' lengths), rounded to a multiple of 1/1024. A batch may span two
    epochs.

    Process `rank` of `world` gets every world-th index of a batch, so the batch over all ranks does not depend on the
    number of ranks. Raises ValueError if a source is empty, or if its weight is too small to be drawn at all.
    """

    def __init__(
        self,
        sources: int | Sequence[range],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.sources = [range(sources)] if isinstance(sources, int) else list(sources)
        if not self.sources or not all(map(len, self.sources)):
            raise ValueError("there is nothing to draw from")
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self._counts = _shares(weights if weights is not None else [len(source) for source in self.sources])
        self._permutation = lru_cache(maxsize=2 * len(self.sources))(
            lambda source, epoch: np.random.default_rng([seed, epoch, source]).permutation(len(self.sources[source]))
        )
        self._block = lru_cache(maxsize=4)(lambda block: _pattern(self._counts, [seed, block]))

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the indices of a step, counted from 0: (batch_size / world,), for this rank."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world]
        return np.array([self._at(place) for place in places], dtype=np.int64)

    def _at(self, place: int) -> int:
        block, inside = divmod(place, BLOCK)
        sources, numbers = self._block(block)
        source = int(sources[inside])
        epoch, draw = divmod(block * self._counts[source] + int(numbers[inside]), len(self.sources[source]))
        return self.sources[source][int(self._permutation(source, epoch)[draw])]


def _shares(weights: Sequence[float]) -> list[int]:
    """Return how many of BLOCK draws each source gets: rounded down, with the rest given to the largest remainders."""
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"a source has less than 1/{BLOCK} of the weight and would never be drawn")
    return [int(count) for count in counts]


def _pattern(counts: list[int], seed: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each draw of a block, in random order, and its number among the draws of that source.

    Both are (BLOCK,).
    """
    sources = np.repeat(np.arange(len(counts)), counts)
    if len(counts) > 1:
        sources = np.random.default_rng(seed).permutation(sources)
    numbers = np.empty(BLOCK, dtype=np.int64)
    for source, count in enumerate(counts):
        numbers[sources == source] = np.arange(count)
    return sources, numbers
