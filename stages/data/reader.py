"""Random access to the pairs of sealed artifacts, through memory maps and the offsets in the receipts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from stages.base import Artifact, StageError
from stages.data.files import sha256_once
from stages.data.pool import ListedShard, intact, read_list
from stages.data.receipts import read_receipt, receipt_of

OPEN_SHARDS = 4096
CHANGED = "or its receipt is missing or changed since it was sealed; `retort shards repair ARTIFACT` makes it again"


@dataclass(frozen=True)
class PairBatch:
    """B pairs. arrays: name -> (B, ...) in the stored dtype. prompts: B strings."""

    arrays: dict[str, NDArray[np.floating]]
    prompts: list[str]

    @property
    def noise(self) -> NDArray[np.floating]:
        """Starting noise (B, C, H, W)."""
        return self.arrays["noise"]

    @property
    def latent(self) -> NDArray[np.floating]:
        """Results of the teacher's ODE (B, C, H, W)."""
        return self.arrays["latent"]


class PairReader:
    """Reads pairs of `shards`, which may belong to several artifacts. Pairs are numbered from 0, in the shards' order.

    arrays: names of the arrays to read. A tar is opened when it is first needed. Each process then hashes it once, and
    compares it with the sealed hash.

    Raises StageError if a shard is missing or changed, if it lacks an array, or if the shapes in a batch differ.
    """

    def __init__(self, shards: Sequence[ListedShard], arrays: Sequence[str] = ("noise", "latent")) -> None:
        damaged = next((shard for shard in shards if not intact(shard)), None)
        if damaged:
            raise StageError(f"{damaged.tar} {CHANGED}")
        self._shards, self._arrays = shards, arrays
        self._ends = list(accumulate(shard.count for shard in shards))
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _OpenShard(shard, arrays))

    @classmethod
    def of(cls, pairs: Artifact, arrays: Sequence[str] = ("noise", "latent")) -> PairReader:
        """Return the reader of a sealed `pairs` artifact."""
        return cls(read_list(pairs.folder), arrays)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> PairBatch:
        """Read the pairs at `indices`."""
        found: dict[str, list[NDArray[np.floating]]] = {name: [] for name in self._arrays}
        prompts = []
        for index in indices:
            shard = bisect_right(self._ends, index)
            opened = self._open(self._shards[shard])
            row = int(index) - (self._ends[shard - 1] if shard else 0)
            for name, arrays in found.items():
                arrays.append(opened.array(name, row))
            prompts.append(opened.prompts[row].as_py())
        try:
            return PairBatch({name: np.stack(arrays) for name, arrays in found.items()}, prompts)
        except ValueError:
            shapes = {name: sorted({array.shape for array in arrays}) for name, arrays in found.items()}
            raise StageError(f"pairs of different shapes cannot be mixed in a batch: {shapes}") from None


class _OpenShard:
    """A memory-mapped shard. Its receipt and tar are checked against the sealed hash when it is opened."""

    def __init__(self, shard: ListedShard, arrays: Sequence[str]) -> None:
        receipt, columns = receipt_of(shard.tar), ["prompt", *(f"{name}_offset" for name in arrays)]
        try:
            facts, rows = read_receipt(receipt.read_bytes(), columns, shard.bytes)
        except KeyError:
            facts, rows = read_receipt(receipt.read_bytes(), ["prompt"], shard.bytes)
        except (OSError, ValueError):
            raise StageError(f"{shard.tar} {CHANGED}") from None
        if facts.sha256 != shard.sha256 or sha256_once(shard.tar) != shard.sha256:
            raise StageError(f"{shard.tar} {CHANGED}")
        absent = next((name for name in arrays if name not in facts.arrays), None)
        if absent is not None:
            raise StageError(f"{shard.tar} has no array {absent}; it has: {', '.join(facts.arrays)}")
        self.bytes = np.memmap(shard.tar, dtype=np.uint8, mode="r")
        self.prompts = rows["prompt"]
        self.offsets = {name: rows[f"{name}_offset"].to_numpy() for name in arrays}
        self.kinds = {name: (np.dtype(facts.arrays[name].dtype), tuple(facts.arrays[name].shape)) for name in arrays}

    def array(self, name: str, row: int) -> NDArray[np.floating]:
        """Return an array of the sample in `row`. It is a view of the memory map."""
        dtype, shape = self.kinds[name]
        start = int(self.offsets[name][row])
        raw = self.bytes[start : start + dtype.itemsize * int(np.prod(shape))]
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
