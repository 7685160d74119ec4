"""Shards that Retort did not make: any webdataset. Members are taken for hostile: pickles are listed and never
opened, arrays are read only when their size is what their header says, nothing is written."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stages.data import tars
from stages.data.inspection.source import Listed, Source
from stages.data.noise import hash64
from stages.data.shards import npy_header
from stages.data.statistics import Moments, histogram

PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "ten", "joblib")
MOST = 256 * 1024**2
"""Bytes of the largest array that is looked into."""


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
    noise: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    characters: Moments = field(default_factory=Moments)
    words: Moments = field(default_factory=Moments)
    empty: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    """Extension -> members that are not what it says."""

    def look(self, source: Source, tar: Listed, deep: bool) -> None:
        """Add one tar: its members and texts; with `deep` the values of its arrays too. Raises ValueError or
        OSError for a tar that is damaged."""
        with source.open(tar.path) as file:
            for number, sample in enumerate(tars.walk(file)):
                self.samples += 1
                for extension, place in sample.members.items():
                    self.members[extension] += 1
                    self.bytes_of[extension] += place[1]
                    self._member(file, extension, place, deep, first=number == 0)

    def _member(self, file: IO[bytes], extension: str, place: tuple[int, int], deep: bool, first: bool) -> None:
        kind = extension.rpartition(".")[2]
        position = file.tell()  # the walk goes on from where it was
        try:
            if kind == "txt":
                self._text(tars.read(file, place).decode("utf-8"))
            elif kind == "json" and deep:
                json.loads(tars.read(file, place))
            elif kind in ("npy", "npz") and (deep or first) and place[1] <= MOST:
                arrays = _npz(tars.read(file, place)) if kind == "npz" else {"": tars.read(file, place)}
                for inside, content in arrays.items():
                    name = f"{extension.removesuffix('.' + kind).removesuffix(kind)}{'/' if inside else ''}{inside}"
                    self._array(name or "array", _array(content), deep)
        except (ValueError, OSError, EOFError, OverflowError, RecursionError, MemoryError, zipfile.BadZipFile):
            self.unreadable[extension] += 1
        except Exception:  # what else NumPy's header parser raises at hostile bytes is not listed anywhere
            self.unreadable[extension] += 1
        finally:
            file.seek(position)

    def _text(self, text: str) -> None:
        self.prompt.append(hash64(text.encode("utf-8")))
        self.characters = self.characters.merge(Moments.of(np.array([len(text)])))
        self.words = self.words.merge(Moments.of(np.array([len(text.split())])))
        self.empty += not text.strip()

    def _array(self, name: str, values: NDArray[Any], deep: bool) -> None:
        summary = self.arrays.setdefault(name, ArraySummary())
        summary.kinds[(values.dtype.name, values.shape)] += 1
        if deep:
            summary.moments = summary.moments.merge(Moments.of(values))
            summary.histogram += np.array(histogram(values))
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
    """A .npy of numbers. Raises ValueError if it is anything else."""
    file = BytesIO(content)
    shape, dtype = npy_header(file)
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise ValueError(f"an array of {dtype}")
    raw = memoryview(content)[file.tell() :]
    if any(side < 0 for side in shape) or len(raw) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("not as long as its header says")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _npz(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST:
            raise ValueError("unpacks to more than is looked into")
        return {info.filename.removesuffix(".npy"): archive.read(info) for info in archive.infolist()}
