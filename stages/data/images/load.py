"""Loads the images and captions of any image set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError
from stages.data.images.config import FileSet, ImageSet
from stages.data.images.files import Example
from stages.data.images.labelled import LabelledImages

IN_MEMORY = 2 * 1024**3
"""Largest size in bytes of decoded images that are held in memory. Larger sets are written to a file."""


def examples(config: FileSet) -> Iterator[Example]:
    """Yield all images of a set in order, still encoded. Raises StageError for an unreadable image or an empty set."""
    some = False
    try:
        for example in config.examples():
            some = True
            yield example
    except FileNotFoundError as error:
        raise StageError(f"image set {error.filename or error}") from None
    if not some:
        raise StageError(f"image set {config.path}: no images found")


def captions(config: ImageSet) -> Iterator[str]:
    """Yield every caption that a set can have. For a FileSet: the caption of each image, including held-out ones."""
    if not isinstance(config, FileSet):
        yield from config.captions()
        return
    for example in examples(config):
        if not example.caption:
            raise StageError(f"image set {config.path} has no captions (caption: null)")
        yield example.caption


def load(
    config: ImageSet, *, held_out: bool = False, limit: int | None = None, scratch: Path | None = None
) -> LabelledImages:
    """Return the training images, or with `held_out` the held-out ones; a random subset of `limit` if there are more.

    Images of a FileSet are decoded once. If they are larger than IN_MEMORY, they are written to a memory-mapped file in
    the folder `scratch`. Raises StageError if there is no such folder, or if an image cannot be read.
    """
    if not isinstance(config, FileSet):
        images = config.load(held_out)
        return images if limit is None else images.take(_some(len(images), limit))
    about = [(example.caption, example.label) for example in _split(config, held_out)]
    kept = _some(len(about), limit)
    wanted = set(kept.tolist())
    chosen = (example for i, example in enumerate(_split(config, held_out)) if i in wanted)
    about = [about[i] for i in kept]
    pixels = _decoded(chosen, (len(about), 3, config.size, config.size), config, held_out, scratch)
    numbers = _class_numbers(config)
    labels = {"label": np.array([numbers[str(label)] for _, label in about], dtype=np.int64)} if numbers else {}
    return LabelledImages(pixels, [caption for caption, _ in about], labels, np.arange(len(about)))


def rows(config: ImageSet, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """Yield `caption`, `origin` and the classes of each image of `load`, in the same order.

    Images of a FileSet are neither decoded nor kept in memory.
    """
    if not isinstance(config, FileSet):
        images = config.load(held_out)
        for i, caption in enumerate(images.captions):
            classes = {name: int(values[i]) for name, values in images.labels.items()}
            yield {"caption": caption, "origin": int(images.origins[i]), **classes}
        return
    numbers = _class_numbers(config)
    for i, example in enumerate(_split(config, held_out)):
        yield {"caption": example.caption, "origin": i, **({"label": numbers[str(example.label)]} if numbers else {})}


def batches(config: ImageSet, size: int, *, held_out: bool = False, start: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Yield the images of `load` in batches (B, 3, H, W) of `size`, beginning with image `start`.

    For a FileSet, only one batch is in memory at a time, and images before `start` are not decoded.
    """
    if not isinstance(config, FileSet):
        images = config.load(held_out).images
        yield from (images[i : i + size] for i in range(start, len(images), size))
        return
    examples = islice(_split(config, held_out), start, None)
    while some := list(islice(examples, size)):
        yield np.stack([example.pixels(config.size) for example in some])


def _split(config: FileSet, held_out: bool) -> Iterator[Example]:
    every, found = config.hold_out_every, False
    for i, example in enumerate(examples(config)):
        if (i % every == every - 1) == held_out:
            found = True
            yield example
    if not found:
        raise StageError(f"image set {config.path}: too few images for hold_out_every: {every}")


def _some(length: int, limit: int | None) -> np.ndarray:
    """Return at most `limit` random indices in ascending order. Random, because files are often sorted by class."""
    places = np.random.default_rng(0).permutation(length)[: length if limit is None else limit]
    return np.sort(places)


def _class_numbers(config: FileSet) -> Mapping[str, int]:
    """Return class name -> number; empty for a set without classes.

    Classes are numbered by the sorted names of both splits, so that the numbers agree between them.
    """
    names = {str(example.label) for example in examples(config)} if config.label is not None else set()
    return {name: place for place, name in enumerate(sorted(names, key=lambda name: (len(name), name)))}


def _decoded(
    chosen: Iterator[Example], shape: tuple[int, ...], config: FileSet, held_out: bool, scratch: Path | None
) -> np.ndarray:
    pixels: np.ndarray
    if int(np.prod(shape)) <= IN_MEMORY:
        pixels = np.empty(shape, dtype=np.uint8)
    elif scratch is None:
        raise StageError(
            f"image set {config.path}: {shape[0]} images of {config.size} pixels are too large to hold in memory"
        )
    else:
        scratch.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(
            scratch / f"images-{'held-out' if held_out else 'training'}.npy", mode="w+", dtype=np.uint8, shape=shape
        )
    for place, example in enumerate(chosen):
        pixels[place] = example.pixels(config.size)
    return pixels
