"""Images and triplets as a perceptual network sees them: as latents of a teacher, or as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.data.triplets.triplets import Triplets

Index = slice | NDArray[np.int64]
Encode = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> what the network sees of them (B, C, h, w)."""

BATCH = 64
SIDES = ("reference", "first", "second")


@dataclass(frozen=True)
class Seen:
    """A labelled image set: `x` gives (B, C, H, W) of an index, float32."""

    x: Callable[[Index], Tensor]
    labels: dict[str, Tensor]
    count: int

    def batch(self, index: Index) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x(index), {name: values[index] for name, values in self.labels.items()}


@dataclass(frozen=True)
class SeenTriplets:
    """arrays: reference, first and second, each (N, C, H, W) float16, memory-mapped."""

    arrays: dict[str, NDArray[np.float16]]
    votes: NDArray[np.float32]
    categories: dict[str, range]
    unseen: frozenset[str]

    def batch(self, index: Index) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values[index].astype(np.float32)) for name, values in self.arrays.items()}


def encoded(triplets: Triplets, encode: Encode, folder: Path) -> Iterator[int]:
    """Write what the network sees of all triplets to `folder`, where it is not there yet; yields how many are done."""
    count = len(triplets.votes)
    final = [folder / f"{name}.npy" for name in SIDES]
    if all(path.exists() for path in final):
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays: list[NDArray[np.float16]] = []
    for start in range(0, count, BATCH):
        stop = min(start + BATCH, count)
        seen = [encode(as_input(images)) for images in triplets.batch(np.arange(start, stop))]
        if not arrays:
            shape = (count, *seen[0].shape[1:])
            arrays = [
                np.lib.format.open_memmap(path.with_suffix(".part"), mode="w+", dtype=np.float16, shape=shape)
                for path in final
            ]
        for array, values in zip(arrays, seen, strict=True):
            array[start:stop] = values.cpu().numpy()
        yield stop
    for array, path in zip(arrays, final, strict=True):
        array.flush()  # type: ignore[attr-defined]
        path.with_suffix(".part").replace(path)


def read(triplets: Triplets, folder: Path) -> SeenTriplets:
    """What `encoded` wrote."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in SIDES}
    return SeenTriplets(arrays, triplets.votes, triplets.categories, triplets.unseen)


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """Images (B, 3, H, W) of 8 bits as networks want them: float32 in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1.0)
