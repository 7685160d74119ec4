"""The inputs of a perceptual network: images and triplets as teacher latents, or as pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.base import StageError
from stages.data.files import write_atomically
from stages.data.images.labelled import scaled
from stages.data.latents import appending
from stages.data.triplets.triplets import Triplets

Index = slice | NDArray[np.int64]
Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> what the network sees of them (B, C, h, w)."""

BATCH = 64
RECORD_EVERY = 16
"""Batches between two records of how far encoding has come."""
SIDES = ("reference", "first", "second")
REACHED = "encoded.json"


@dataclass(frozen=True)
class Seen:
    """A labelled image set: `x` gives (B, C, H, W) of an index, float32."""

    x: Callable[[Index], Tensor]
    labels: dict[str, Tensor]
    count: int

    def batch(self, index: Index) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x(index), {name: values[index] for name, values in self.labels.items()}

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All of it, in order."""
        return (self.batch(slice(start, start + BATCH)) for start in range(0, self.count, BATCH))


@dataclass(frozen=True)
class SeenTriplets:
    """arrays: reference, first and second, each (N, C, H, W), memory-mapped; the rest as of Triplets."""

    arrays: dict[str, NDArray[np.floating]]
    votes: NDArray[np.float32]
    categories: dict[str, range]
    unseen: frozenset[str]

    def batch(self, index: Index) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values[index].astype(np.float32)) for name, values in self.arrays.items()}


def encoded(triplets: Triplets, encode: Encode, folder: Path, dtype: np.dtype) -> Iterator[int]:
    """Write what the network sees of all triplets to `folder`, from where an earlier attempt ended; yields how many
    are done. Raises StageError for what `dtype` cannot hold."""
    count, record = len(triplets.votes), folder / REACHED
    folder.mkdir(parents=True, exist_ok=True)
    reached = json.loads(record.read_text(encoding="utf-8"))["done"] if record.exists() else 0
    if reached == count:
        return
    shape = (count, *_encoded(triplets, encode, range(1), dtype)[0].shape[1:])
    with ExitStack() as stack:
        files = [stack.enter_context(appending(folder / f"{name}.npy", shape, dtype, reached)) for name in SIDES]
        for place, start in enumerate(range(reached, count, BATCH), 1):
            stop = min(start + BATCH, count)
            for file, values in zip(files, _encoded(triplets, encode, range(start, stop), dtype), strict=True):
                file.write(values.tobytes())
            if place % RECORD_EVERY == 0 or stop == count:
                for file in files:
                    file.flush()
                write_atomically(record, json.dumps({"done": stop}).encode())
                yield stop


def _encoded(triplets: Triplets, encode: Encode, places: range, dtype: np.dtype) -> Sequence[NDArray[np.floating]]:
    with np.errstate(over="ignore"):  # what comes of it is looked at
        found = [
            encode(torch.from_numpy(scaled(images))).cpu().numpy().astype(dtype)
            for images in triplets.batch(np.array(places))
        ]
    if not all(np.isfinite(values).all() for values in found):
        where = f"triplets {places.start} to {places.stop}"
        raise StageError(f"{where} hold numbers too large for {dtype}: give the latents storage_dtype: float32")
    return found


def read(triplets: Triplets, folder: Path) -> SeenTriplets:
    """What `encoded` wrote."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in SIDES}
    return SeenTriplets(arrays, triplets.votes, triplets.categories, triplets.unseen)
