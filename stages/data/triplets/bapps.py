"""Reads BAPPS from disk: all votes at once, and images when a batch needs them.

Every problem raises a StageError that names the path and what was expected there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError

LAYOUT = "expected PATH/train/CATEGORY and PATH/val/CATEGORY, each with ref/, p0/, p1/ (NAME.png) and judge/ (NAME.npy)"
PARTS = ("ref", "p0", "p1")
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
"""Formats that Pillow may read. Some of its other readers start programs."""


class BappsTriplets:
    """The BAPPS categories `train`, or with `held_out` the categories `test` of its validation set.

    Implements the interface Triplets.
    """

    def __init__(self, path: str, train: Sequence[str], test: Sequence[str], held_out: bool) -> None:
        split, names = ("val", test) if held_out else ("train", train)
        self._triplets: list[tuple[Path, str]] = []
        self.categories: dict[str, range] = {}
        for name in names:
            folder = Path(path) / split / name
            found = _names(folder)
            self.categories[name] = range(len(self._triplets), len(self._triplets) + len(found))
            self._triplets += [(folder, file) for file in found]
        self.unseen = frozenset(test).difference(train) if held_out else frozenset()
        self.votes = np.array([_vote(_judge(folder, file)) for folder, file in self._triplets], dtype=np.float32)
        self._first = self._triplets[0][0] / "ref" / self._triplets[0][1]
        self._shape = _pixels(self._first).shape

    def batch(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the references, first images and second images, each (B, 3, H, W)."""
        triplets = [self._triplets[i] for i in index]
        reference, first, second = (self._stacked(folder / part / file for folder, file in triplets) for part in PARTS)
        return reference, first, second

    def _stacked(self, paths: Iterable[Path]) -> NDArray[np.uint8]:
        return np.stack([self._image(path) for path in paths])

    def _image(self, path: Path) -> NDArray[np.uint8]:
        pixels = _pixels(path)
        if pixels.shape != self._shape:
            (_, high, wide), (_, height, width) = pixels.shape, self._shape
            raise StageError(
                f"BAPPS {path}: {wide}x{high} pixels; expected {width}x{height}, as in {self._first}: "
                "all images must have the same size"
            )
        return pixels


def _names(folder: Path) -> list[str]:
    """Return the names of a category's reference images, sorted. Raises StageError if part of a triplet is missing."""
    if not folder.is_dir():
        raise StageError(f"BAPPS {folder} is not a folder; {LAYOUT}")
    found = {part: set(_listed(folder / part, SUFFIXES)) for part in PARTS}
    judged = {Path(file).stem for file in _listed(folder / "judge", (".npy",))}
    every = sorted(set().union(*found.values()))
    for part, files in found.items():
        for file in every:
            if file not in files:
                raise StageError(f"BAPPS {folder / part / file} is missing from its triplet; {LAYOUT}")
    for stem in sorted(judged.symmetric_difference(Path(file).stem for file in every)):
        missing = folder / (f"ref/{stem}.png" if stem in judged else f"judge/{stem}.npy")
        raise StageError(f"BAPPS {missing} is missing from its triplet; {LAYOUT}")
    if len(every) < 2:  # the standard error of a score needs two
        raise StageError(f"BAPPS {folder} holds {len(every)} triplets; expected at least two; {LAYOUT}")
    return every


def _listed(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.lower().endswith(suffixes) and not name.startswith(".")]
    except OSError as error:
        raise StageError(f"BAPPS {folder} cannot be read as a folder ({error.strerror}); {LAYOUT}") from None


def _judge(folder: Path, file: str) -> Path:
    return folder / "judge" / f"{Path(file).stem}.npy"


def _vote(path: Path) -> float:
    expected = "expected an array of one number from 0 to 1, the share of people who chose p1 as the closer image"
    try:
        with open(path, "rb") as file:
            vote = float(np.lib.format.read_array(file, allow_pickle=False).item())
    except (OSError, ValueError, TypeError) as error:
        raise StageError(f"BAPPS {path}: {error}; {expected}") from None
    if not 0.0 <= vote <= 1.0:
        raise StageError(f"BAPPS {path}: the vote is {vote:g}; {expected}")
    return vote


def _pixels(path: Path) -> NDArray[np.uint8]:
    """Decode an image to (3, H, W) uint8 in RGB. Raises StageError."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            return np.asarray(opened.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StageError(f"BAPPS {path}: cannot be read as PNG or JPEG ({error})") from None
