"""Shards that Retort did not make: any webdataset. Members are taken for hostile: pickles are listed and never
opened, arrays are read only when their size is what their header says, nothing is written."""

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
MOST = 256 * 1024**2
"""Bytes of the largest member that is looked into."""
MOST_PIXELS = 2**25
"""Of the largest image that is decoded: 134 MB at four bytes a pixel. A few kilobytes of PNG may say that they are
gigabytes."""


CHUNK = 1 << 20
"""Elements that are summarised at once."""


SIDE = 1024
"""Pixels of the longest side of an image that is shown."""


class NotNumbersError(Exception):
    """A member that is whole but holds something else than numbers, or too much of them."""


@dataclass
class ArraySummary:
    kinds: Counter[tuple[str, tuple[int, ...]]] = field(default_factory=Counter)
    """(dtype, shape) -> how many."""
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
    """Extension -> members that are not what it says."""
    unseen: Counter[str] = field(default_factory=Counter)
    """Extension -> members of other kinds than numbers, or too large, which are not looked into."""
    images: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) -> how many."""

    def look(self, source: Source, tar: Listed, deep: bool) -> None:
        """Add one tar: its members and texts; with `deep` the values of its arrays and its images, too. Raises
        ValueError or OSError for a tar that is damaged."""
        lengths: list[tuple[int, int]] = []
        with source.open(tar.path) as file:
            for number, sample in enumerate(tars.walk(file)):
                self.samples += 1
                for name, place in sample.members.items():
                    extension = name.encode("utf-8", "backslashreplace").decode()  # names are bytes, of any kind
                    self.members[extension] += 1
                    self.bytes_of[extension] += place[1]
                    position = file.tell()  # the walk goes on from where it was
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
        except Exception:  # what NumPy, zipfile and Pillow raise at hostile bytes is listed nowhere
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
        return {name: count for name, count in self.members.items() if name.rpartition(".")[2] in PICKLES}

    @property
    def incomplete(self) -> dict[str, int]:
        """Members that most samples have -> how many samples lack them."""
        return {n: self.samples - c for n, c in self.members.items() if self.samples / 2 < c < self.samples}


def _array(content: bytes) -> NDArray[Any]:
    """A .npy of numbers. Raises NotNumbersError for another kind, ValueError for what is none at all."""
    file = BytesIO(content)
    shape, dtype = npy_header(file)
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise NotNumbersError
    raw = memoryview(content)[file.tell() :]
    if any(side < 0 for side in shape) or len(raw) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("not as long as its header says")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _npz(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST:
            raise NotNumbersError
        inside = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): archive.read(info) for info in inside}


def image_size(content: bytes) -> tuple[int, int]:
    """(width, height) of an image that decodes. Raises NotNumbersError for one of too many pixels to decode, and
    whatever Pillow does for what is none. Only these formats are ever tried: others run programs."""
    from PIL import Image

    with Image.open(BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise NotNumbersError
        image.load()
        return image.size


def small_image(content: bytes) -> NDArray[np.uint8] | None:
    """An image (H, W, 3) with sides of at most SIDE, scaled down where it is larger; None if it has too many pixels to
    decode. Raises as `image_size`."""
    from PIL import Image

    with Image.open(BytesIO(content), formats=FORMATS) as image:
        image.draft(None, (SIDE, SIDE))  # a JPEG is decoded at a fraction of its size
        if image.width * image.height > MOST_PIXELS:
            return None
        image.thumbnail((SIDE, SIDE))
        return np.asarray(image.convert("RGB"))
