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
from stages.networks.compute import prepare
from stages.networks.network import NetworkTeacher
from stages.networks.teachers import load_network

BATCH = 64
"""Images encoded at once, always the same ones: bits may depend on what else is in a batch."""
RECORD_EVERY = 4
"""Batches between two records of how far it came: what a kill may cost."""


class Reached(Config):
    """How far an attempt came: `done` of `total` images, those to train on first, and what their latents are like."""

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
    """Write what `read_latents` reads to `output`, going on from what `record` says is there; return figures.

    Captions and classes come first: what is wrong with them is found before anything is encoded. Raises StageError
    for images that cannot be read or do not fit the VAE, and for latents that are not finite.
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


def _latent_shape(network: NetworkTeacher, size: int) -> tuple[int, int, int]:
    """Of images of `size` pixels. Raises StageError where the VAE would cut some of them off."""
    factor = network.down_sampling
    if size % factor:
        raise StageError(
            f"images of {size} pixels do not fit the teacher's VAE, which makes one latent of {factor} x {factor} "
            f"pixels; give images a `size` that is a multiple of {factor}"
        )
    return network.latent_shape[0], size // factor, size // factor


def _count(images: ImageSet, held_out: bool, output: Path) -> int:
    """How many images a split has, its rows written if they are not there."""
    path = output / f"{NAMES[held_out]}.parquet"
    if not path.exists():
        write_rows(path, rows(images, held_out=held_out))
    return count_rows(path)


def _encoded(network: NetworkTeacher, images: NDArray[np.uint8], dtype: np.dtype) -> NDArray[np.floating]:
    latents = network.to_numpy(network.encode(torch.from_numpy(scaled(images))))
    with np.errstate(over="ignore"):  # what does not fit is found to be infinite
        return latents.astype(dtype)


def _check(latents: NDArray[np.floating], split: str, first: int) -> None:
    """Raise StageError unless the latents, of the images of a split from number `first` on, are finite."""
    finite = np.isfinite(latents).reshape(len(latents), -1).all(1)
    if not finite.all():
        raise StageError(
            f"the latent of {split} image {first + int(np.argmin(finite))} is not finite in {latents.dtype}; "
            f"{int((~finite).sum())} of this batch of {len(latents)} are affected. Give storage_dtype: float32; if "
            "that does not help, the teacher's VAE is damaged"
        )
