"""The inputs of a perceptual network: images and triplets, as latents of the teacher or as pixels."""

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
"""Images (B, 3, H, W) in [-1, 1] -> inputs of the network (B, C, h, w)."""

BATCH = 64
RECORD_EVERY = 16
"""Batches between two records of how far encoding has come."""
SIDES = ("reference", "first", "second")
REACHED = "encoded.json"


@dataclass(frozen=True)
class Seen:
    """A labelled image set. `x` returns the inputs at an index, (B, C, H, W) float32. labels: name -> (N,)."""

    x: Callable[[Index], Tensor]
    labels: dict[str, Tensor]
    count: int

    def batch(self, index: Index) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the inputs (B, C, H, W) and labels, name -> (B,), at `index`."""
        return self.x(index), {name: values[index] for name, values in self.labels.items()}

    def batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the whole set in order, in batches of inputs and labels."""
        return (self.batch(slice(start, start + BATCH)) for start in range(0, self.count, BATCH))


@dataclass(frozen=True)
class SeenTriplets:
    """Encoded triplets. arrays: reference, first and second, each (N, C, H, W), memory-mapped. Other fields are as in
    Triplets."""

    arrays: dict[str, NDArray[np.floating]]
    votes: NDArray[np.float32]
    categories: dict[str, range]
    unseen: frozenset[str]

    def batch(self, index: Index) -> dict[str, Tensor]:
        """Return reference, first and second at `index`, each (B, C, H, W) float32."""
        return {name: torch.from_numpy(values[index].astype(np.float32)) for name, values in self.arrays.items()}


def encoded(triplets: Triplets, encode: Encode, folder: Path, dtype: np.dtype) -> Iterator[int]:
    """Encode all triplets and write them to `folder`, continuing an earlier attempt. Yield how many are encoded.

    Raises StageError if a value does not fit into `dtype`.
    """
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
    with np.errstate(over="ignore"):  # infinite values are found below
        found = [
            encode(torch.from_numpy(scaled(images))).cpu().numpy().astype(dtype)
            for images in triplets.batch(np.array(places))
        ]
    if not all(np.isfinite(values).all() for values in found):
        where = f"triplets {places.start} to {places.stop}"
        raise StageError(f"{where} have values too large for {dtype}: set storage_dtype: float32 in the latents stage")
    return found


def read(triplets: Triplets, folder: Path) -> SeenTriplets:
    """Read the triplets that `encoded` wrote."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in SIDES}
    return SeenTriplets(arrays, triplets.votes, triplets.categories, triplets.unseen)
