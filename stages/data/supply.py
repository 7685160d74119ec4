"""Batches of training data for a student: stored pairs, the latents of an image set, or prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError
from stages.data.latents import LabelledLatents, read_latents
from stages.data.order import ShuffledOrder
from stages.data.pool import read_list
from stages.data.prompts.table import PromptTable
from stages.data.reader import PairReader


class Supply(Protocol):
    """A source of training batches: `prompts` (B strings), and arrays such as `latent` (B, C, H, W) as stored."""

    count: int
    """Number of training samples."""

    def batch(self, step: int) -> Mapping[str, Any]:
        """Return the batch of a step, counted from 0. It depends only on the step and the seed.

        During training, one thread calls this method. It is not the thread that trains."""


class PairSupply:
    """Pairs of several artifacts, mixed by weight: `noise` and `latent`, each (B, C, H, W), `prompts`, and w (B,), the
    guidance scale - 1.

    weights: one for each artifact; None stands for its number of pairs. The last `held_out` pairs of the first artifact
    are not trained on. They have the indices `held`, which `read` takes. scale: the guidance scale of all pairs. None:
    each pair stores its own. Raises StageError for damaged pairs or a weight that is too small.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        weights: Sequence[float | None],
        held_out: int,
        batch_size: int,
        seed: int,
        scale: float | None = 1.0,
    ) -> None:
        lists = [read_list(folder) for folder in folders]
        arrays = ("noise", "latent") if scale is not None else ("noise", "latent", "guidance_scale")
        self._reader = PairReader([shard for shards in lists for shard in shards], arrays)
        self._scale = scale
        ends = list(accumulate(sum(shard.count for shard in shards) for shards in lists))
        self.held = range(ends[0] - held_out, ends[0])
        self._ranges = [range(self.held.start), *(range(*ends[i : i + 2]) for i in range(len(ends) - 1))]
        shares = [len(drawn) if weight is None else weight for drawn, weight in zip(self._ranges, weights, strict=True)]
        self.count = sum(map(len, self._ranges))
        try:
            self._order = ShuffledOrder(self._ranges, batch_size, seed, weights=shares)
        except ValueError as error:
            raise StageError(f"pairs: {error}") from None

    def batch(self, step: int) -> Mapping[str, Any]:
        return self.read(self._order.batch(step))

    def examples(self, count: int) -> Mapping[str, Any]:
        """Return `count` different random training pairs, or all of them if there are fewer."""
        drawn = np.random.default_rng(0).choice(self.count, min(count, self.count), replace=False)
        return self.read([self._trained_on(int(place)) for place in np.sort(drawn)])

    def _trained_on(self, place: int) -> int:
        """Return the index of training pair number `place`, as `read` takes it."""
        for drawn in self._ranges:
            if place < len(drawn):
                return drawn[place]
            place -= len(drawn)
        raise IndexError(place)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> Mapping[str, Any]:
        """Return the pairs at `indices`, which count the pairs of all artifacts in their order."""
        drawn = self._reader.batch(indices)
        if self._scale is None:
            w = drawn.arrays["guidance_scale"] - 1
        else:
            w = np.full(len(indices), self._scale - 1, np.float32)
        return {"noise": drawn.noise, "latent": drawn.latent, "prompts": drawn.prompts, "w": w}


class LatentSupply:
    """Latents of an image set's training images. `prompts_of` makes the teacher's prompts from captions and labels.

    Raises StageError if the latents cannot be read.
    """

    def __init__(
        self, folder: Path, prompts_of: Callable[[LabelledLatents], list[str]], batch_size: int, seed: int
    ) -> None:
        self._latents = read_latents(folder, held_out=False)
        self._prompts = prompts_of(self._latents)
        self.shape: tuple[int, ...] = self._latents.latents.shape[1:]
        self.count = len(self._latents)
        self._order = ShuffledOrder(self.count, batch_size, seed)

    def batch(self, step: int) -> Mapping[str, Any]:
        index = self._order.batch(step)
        return {"latent": self._latents.batch(index), "prompts": [self._prompts[i] for i in index]}


class PromptSupply:
    """Prompts only, from the prompt table in a folder."""

    def __init__(self, folder: Path, batch_size: int, seed: int) -> None:
        self._table = PromptTable(folder)
        self.count = len(self._table)
        self._order = ShuffledOrder(self.count, batch_size, seed)

    def batch(self, step: int) -> Mapping[str, Any]:
        return {"prompts": self._table.of(map(int, self._order.batch(step)))}
