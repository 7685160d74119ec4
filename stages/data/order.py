"""The order in which samples are drawn: a pure function of (seed, step), so that resuming needs no state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class ShuffledOrder:
    """Batches of indices below `length`: epoch after epoch, each a fresh permutation, nothing dropped.

    An epoch's last batch runs over into the next epoch. `rank` of `world` gets every world-th index, so
    that the union over ranks is the same batch whatever the number of ranks.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if length < 1:
            raise ValueError("there is nothing to draw from")
        self.length, self.batch_size, self.rank, self.world = length, batch_size, rank, world
        self._permutation = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(length))

    def batch(self, step: int) -> NDArray[np.int64]:
        """The indices of the 0-based `step`."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world]
        return np.array([self._permutation(int(p // self.length))[p % self.length] for p in places], dtype=np.int64)
