"""Encodes an image set with a teacher's VAE, batch by batch."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.base import Config, Execution, Progress, StageError
from stages.data.files import write_atomically
from stages.data.images.config import ImageSet
from stages.data.images.labelled import scaled
from stages.data.images.load import batches, rows
from stages.data.latents import NAMES, appending, count_classes, count_rows, write_rows
from stages.data.statistics import Moments
from stages.networks.adapter import Adapter
from stages.networks.compute import prepare
from stages.networks.teachers import load_network

BATCH = 64
"""Images in a batch. Batches always have the same images, because bits of a latent may depend on its batch."""
RECORD_EVERY = 4
"""Batches between two records of progress. A killed attempt loses at most this many."""


class Reached(Config):
    """The progress of an attempt: `done` of `total` images, training images first, and the moments of their latents."""

    done: int
    total: int
    moments: Moments


def encode_images(
    teacher: Path,
    images: ImageSet,
    storage_dtype: str,
    execution: Execution,
    output: Path,
    record: Path,
    threads: int,
) -> Generator[Progress, None, dict[str, Any]]:
    """Encode an image set and write the files that `read_latents` reads to `output`. Return statistics.

    record: the file that holds the progress. An earlier attempt is continued from it. Captions and classes are written
    first, so that their errors are found before any image is encoded. Raises StageError for images that cannot be read
    or do not fit the VAE, and for latents that are not finite.
    """
    prepare(threads)
    network, dtype = load_network(teacher, execution), np.dtype(storage_dtype)
    shape = _latent_shape(network, images.size)
    record.parent.mkdir(parents=True, exist_ok=True)
    counts = {held_out: _count(images, held_out, output) for held_out in NAMES}
    total = sum(counts.values())
    reached = Reached(done=0, total=total, moments=Moments())
    if record.exists():
        reached = Reached.model_validate_json(record.read_bytes())
    reused, started = reached.done, time.monotonic()
    yield Progress(reused, total, "images")
    for held_out, count in counts.items():
        before = counts[False] if held_out else 0
        first = max(reached.done - before, 0)
        if first >= count:
            continue
        with appending(output / f"{NAMES[held_out]}.npy", (count, *shape), dtype, first) as file:
            for number, batch in enumerate(batches(images, BATCH, held_out=held_out, start=first), 1):
                latents = _encoded(network, batch, dtype)
                _check(latents, NAMES[held_out], reached.done - before)
                file.write(latents.tobytes())
                moments = reached.moments.merge(Moments.of(latents))
                reached = Reached(done=reached.done + len(batch), total=total, moments=moments)
                if number % RECORD_EVERY == 0 or reached.done == before + count:
                    file.flush()
                    os.fsync(file.fileno())
                    write_atomically(record, reached.model_dump_json().encode())
                rate = (reached.done - reused) / (time.monotonic() - started)
                yield Progress(reached.done, total, "images", {"per_second": rate})
    return {
        "counts": {NAMES[held_out]: count for held_out, count in counts.items()},
        "latent_shape": list(shape),
        "latent_mean": reached.moments.mean,
        "latent_std": reached.moments.std,
        "classes": count_classes(output),
        "device": network.device_name,
    }


def _latent_shape(network: Adapter, size: int) -> tuple[int, int, int]:
    """Return (C, h, w) for images of `size` pixels. Raises StageError if the VAE would crop them."""
    factor = network.down_sampling
    if size % factor:
        raise StageError(
            f"images of {size} pixels do not fit the teacher's VAE, which scales images down by {factor}; give images "
            f"a `size` that is a multiple of {factor}"
        )
    return network.latent_shape[0], size // factor, size // factor


def _count(images: ImageSet, held_out: bool, output: Path) -> int:
    """Return the number of images of a split. Write its rows if they do not exist."""
    path = output / f"{NAMES[held_out]}.parquet"
    if not path.exists():
        write_rows(path, rows(images, held_out=held_out))
    return count_rows(path)


def _encoded(network: Adapter, images: NDArray[np.uint8], dtype: np.dtype) -> NDArray[np.floating]:
    latents = network.to_numpy(network.encode(torch.from_numpy(scaled(images))))
    with np.errstate(over="ignore"):  # overflow becomes infinite, which `_check` finds
        return latents.astype(dtype)


def _check(latents: NDArray[np.floating], split: str, first: int) -> None:
    """Raise StageError unless all latents of a batch are finite. `first` is the number of its first image."""
    finite = np.isfinite(latents).reshape(len(latents), -1).all(1)
    if not finite.all():
        raise StageError(
            f"the latent of {split} image {first + int(np.argmin(finite))} is not finite in {latents.dtype}; "
            f"{int((~finite).sum())} of this batch of {len(latents)} are affected. Set storage_dtype: float32. If "
            "that does not help, the teacher's VAE is damaged"
        )
