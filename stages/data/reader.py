"""Random access to the pairs of a sealed artifact, through its receipts' offsets and memory maps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError
from stages.data.pool import ListedShard, intact
from stages.data.shards import ARRAYS, read_facts, read_rows, receipt_of

OPEN_SHARDS = 512
CHANGED = "or its receipt is missing or changed since it was sealed; `retort resume` with its run makes it again"


@dataclass(frozen=True)
class PairBatch:
    """noise, latent: (B, C, H, W) as stored; prompts: B strings."""

    noise: NDArray[np.floating]
    latent: NDArray[np.floating]
    prompts: list[str]


class PairReader:
    """The pairs of `shards`, numbered from 0 in the order of the list. No tar is opened before it is needed.

    Raises StageError when a shard is missing or not the one that was sealed.
    """

    def __init__(self, shards: Sequence[ListedShard]) -> None:
        damaged = next((shard for shard in shards if not intact(shard)), None)
        if damaged:
            raise StageError(f"{damaged.tar} {CHANGED}")
        self._shards = shards
        self._ends = list(accumulate(shard.count for shard in shards))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_OpenShard)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> PairBatch:
        noise, latent, prompts = [], [], []
        for index in indices:
            shard = bisect_right(self._ends, index)
            opened = self._open(self._shards[shard])
            row = int(index) - (self._ends[shard - 1] if shard else 0)
            noise.append(opened.array("noise", row))
            latent.append(opened.array("latent", row))
            prompts.append(opened.prompts[row].as_py())
        return PairBatch(np.stack(noise), np.stack(latent), prompts)


class _OpenShard:
    def __init__(self, shard: ListedShard) -> None:
        receipt = receipt_of(shard.tar)
        facts, rows = read_facts(receipt), read_rows(receipt)
        if facts.sha256 != shard.sha256:
            raise StageError(f"{shard.tar} {CHANGED}")
        self.bytes = np.memmap(shard.tar, dtype=np.uint8, mode="r")
        self.prompts = rows["prompt"]
        self.offsets = {name: rows[f"{name}_offset"].to_numpy() for name in ARRAYS}
        self.kinds = {
            name: (np.dtype(facts.arrays[name]["dtype"]), tuple(facts.arrays[name]["shape"])) for name in ARRAYS
        }

    def array(self, name: str, row: int) -> NDArray[np.floating]:
        dtype, shape = self.kinds[name]
        start = int(self.offsets[name][row])
        raw = self.bytes[start : start + dtype.itemsize * int(np.prod(shape))]
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
