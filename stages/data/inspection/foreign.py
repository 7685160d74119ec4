"""Inspect shards that Retort did not make: any webdataset.

Their members are not trusted. Pickles are counted and never opened. Arrays are read only if their size is what their
header says. Nothing is written.
"""

from __future__ import annotations

import json
import zipfile
from array import array
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stages.data import tars
from stages.data.images.files import FORMATS, IMAGES
from stages.data.inspection.source import Listed, Source
from stages.data.noise import hash64
from stages.data.shards import npy_header
from stages.data.statistics import Moments, histogram

PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "ten", "joblib")
"""Extensions of files that may run code when they are loaded."""
MOST = 256 * 1024**2
"""Bytes of the largest member that is read."""
MOST_PIXELS = 2**25
"""Pixels of the largest image that is decoded: 134 MB at four bytes a pixel. A PNG of a few kilobytes can claim
gigabytes."""


CHUNK = 1 << 20
"""Elements that are summarised at once."""


SIDE = 1024
"""Pixels of the longest side of a shown image."""


class NotNumbersError(Exception):
    """A member that is intact, but does not hold numbers or is too large."""


@dataclass
class ArraySummary:
    """Kinds, moments and histogram of all arrays of one name."""

    kinds: Counter[tuple[str, tuple[int, ...]]] = field(default_factory=Counter)
    """(dtype, shape) -> number of arrays."""
    moments: Moments = field(default_factory=Moments)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.array(histogram(np.zeros(0)), dtype=np.int64))


@dataclass
class Foreign:
    """What was found in the tars so far."""

    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    arrays: dict[str, ArraySummary] = field(default_factory=dict)
    noise: array[int] = field(default_factory=lambda: array("Q"))
    prompt: array[int] = field(default_factory=lambda: array("Q"))
    characters: Moments = field(default_factory=Moments)
    words: Moments = field(default_factory=Moments)
    empty: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    """Extension -> number of members whose content is not what the extension says."""
    unseen: Counter[str] = field(default_factory=Counter)
    """Extension -> number of members that were not read: they do not hold numbers, or are too large."""
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) -> number of images."""

    def look(self, source: Source, tar: Listed, deep: bool) -> None:
        """Add one tar: its members and texts, and with `deep` also the values of its arrays and its images.

        Without `deep`, only the first sample of the tar has its arrays, images and JSON read. Raises ValueError or
        OSError for a damaged tar.
        """
        lengths: list[tuple[int, int]] = []
        with source.open(tar.path) as file:
            for number, sample in enumerate(tars.walk(file)):
                self.samples += 1
                for name, place in sample.members.items():
                    extension = name.encode("utf-8", "backslashreplace").decode()  # names may be any bytes
                    self.members[extension] += 1
                    self.bytes_of[extension] += place[1]
                    position = file.tell()  # the walk continues from here
                    self._member(file, extension, place, deep, number == 0, lengths)
                    file.seek(position)
        characters, words = np.array(lengths or [(0, 0)]).T[:, : len(lengths)]
        self.characters = self.characters.merge(Moments.of(characters))
        self.words = self.words.merge(Moments.of(words))

    def _member(
        self,
        file: IO[bytes],
        extension: str,
        place: tuple[int, int],
        deep: bool,
        first: bool,
        lengths: list[tuple[int, int]],
    ) -> None:
        kind = extension.rpartition(".")[2]
        if kind not in ("txt", "json", "npy", "npz", *IMAGES) or (kind != "txt" and not (deep or first)):
            return
        try:
            if place[1] > MOST:
                raise NotNumbersError
            content = tars.read(file, place)
            if kind == "txt":
                text = content.decode("utf-8")
                self.prompt.append(hash64(content))
                self.empty += not text.strip()
                lengths.append((len(text), len(text.split())))
            elif kind == "json":
                json.loads(content)
            elif kind in IMAGES:
                self.images[image_size(content)] += 1
            else:
                stem = extension.removesuffix(kind).removesuffix(".")
                for inside, raw in (_npz(content) if kind == "npz" else {"": content}).items():
                    self._array("/".join(filter(None, (stem, inside))) or "array", _array(raw), deep)
        except NotNumbersError:
            self.unseen[extension] += 1
        except Exception:  # the errors of NumPy, zipfile and Pillow for hostile bytes are not documented
            self.unreadable[extension] += 1

    def _array(self, name: str, values: NDArray[Any], deep: bool) -> None:
        summary = self.arrays.setdefault(name, ArraySummary())
        summary.kinds[(values.dtype.name, values.shape)] += 1
        if deep:
            for part in np.array_split(values.ravel(), max(1, values.size // CHUNK)):
                summary.moments = summary.moments.merge(Moments.of(part))
                summary.histogram += np.array(histogram(part))
            if name == "noise":
                self.noise.append(hash64(values.tobytes()))

    @property
    def never_opened(self) -> dict[str, int]:
        """Extension of pickles -> number of members."""
        return {name: count for name, count in self.members.items() if name.rpartition(".")[2] in PICKLES}

    @property
    def incomplete(self) -> dict[str, int]:
        """Member that most samples have -> number of samples without it."""
        return {n: self.samples - c for n, c in self.members.items() if self.samples / 2 < c < self.samples}


def _array(content: bytes) -> NDArray[Any]:
    """Read a .npy of numbers. Raises NotNumbersError for other dtypes, and ValueError for content that is no .npy."""
    file = BytesIO(content)
    shape, dtype = npy_header(file)
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise NotNumbersError
    raw = memoryview(content)[file.tell() :]
    if any(side < 0 for side in shape) or len(raw) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("its size is not what its header says")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _npz(content: bytes) -> dict[str, bytes]:
    """Name -> content of each .npy in an .npz. Raises NotNumbersError if they are too large together."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST:
            raise NotNumbersError
        inside = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): archive.read(info) for info in inside}


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an image, which is decoded. Raises NotNumbersError for one with more than MOST_PIXELS.

    For content that is no image, Pillow's errors are raised. Only the formats in FORMATS are tried: others start
    programs.
    """
    from PIL import Image

    with Image.open(BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise NotNumbersError
        image.load()
        return image.size


def small_image(content: bytes) -> NDArray[np.uint8] | None:
    """An image (H, W, 3) in uint8, scaled down to sides of at most SIDE. None if it has more than MOST_PIXELS.

    Raises Pillow's errors for content that is no image.
    """
    from PIL import Image

    with Image.open(BytesIO(content), formats=FORMATS) as image:
        image.draft(None, (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
        if image.width * image.height > MOST_PIXELS:
            return None
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image.convert("RGB"))
