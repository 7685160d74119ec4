"""Images of the user's own, read in streams: folders, webdataset shards, parquet.

What is wrong is a StageError that names the file, the row or key, and what was expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError
from stages.data import tars
from stages.data.files import files_of
from stages.data.images.config import FileSet, ImageFolder, ParquetImages, WebDataset

IMAGES = ("jpg", "jpeg", "png", "webp")
METADATA = ("metadata.csv", "metadata.jsonl")
BY_FOLDER = "folder"
FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may take a file for: some of its other readers run programs."""
ROWS = 64


@dataclass(frozen=True)
class Example:
    """An encoded image with its caption and label, and in words where it stands."""

    where: str
    encoded: bytes | Path
    caption: str
    label: Any

    def pixels(self, size: int) -> NDArray[np.uint8]:
        """(3, size, size) in RGB: scaled to `size` on the shorter side, the middle square of it."""
        from PIL import Image, ImageOps

        try:
            source = self.encoded if isinstance(self.encoded, Path) else BytesIO(self.encoded)
            with Image.open(source, formats=FORMATS) as opened:
                upright = ImageOps.exif_transpose(opened)
                if upright.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off instead of scaling
                    upright = Image.fromarray((np.asarray(upright) / 257.0).round().clip(0, 255).astype(np.uint8))
                upright = upright.convert("RGB")
                square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise StageError(f"{self.where}: not an image that can be read ({error})") from None
        return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)


def examples(config: FileSet) -> Iterator[Example]:
    """All examples of the set, in order. Raises StageError, also if there is none."""
    some = False
    try:
        for example in _READERS[type(config)](config):
            some = True
            yield example
    except FileNotFoundError as error:
        raise StageError(f"image set {error.filename or error}") from None
    if not some:
        raise StageError(f"image set {config.path}: there is no image")


def _folder(config: ImageFolder) -> Iterator[Example]:
    folder = Path(config.path)
    metadata = next((folder / name for name in METADATA if (folder / name).exists()), None)
    if metadata is not None:
        for number, row in _rows(metadata):
            where = f"{metadata}, row {number}"
            file = folder / _text(row, "file_name", where)
            try:
                inside = file.resolve().is_relative_to(folder.resolve()) and file.is_file()
            except (OSError, ValueError):
                inside = False
            if not inside:
                raise StageError(f"{where}: file_name {row['file_name']!r:.80} is no file below {folder}")
            yield Example(str(file), file, _caption(row, config, where), _label(row, config, where))
        return
    if config.label not in (None, BY_FOLDER) or config.caption not in (None, "txt"):
        wanted = config.label if config.label not in (None, BY_FOLDER) else config.caption
        raise StageError(
            f"image set {folder}: column {wanted!r} needs {' or '.join(METADATA)}; for text files beside the images "
            "give caption: txt, for no captions caption: null, for a folder a class label: folder"
        )
    for name, file in files_of(config.path, tuple(f"**/*.{kind}" for kind in IMAGES)).items():
        text, label = file.with_suffix(".txt"), None
        if config.label:
            if file.parent == folder:
                raise StageError(f"{file}: expected it in a folder named by its class, as label: folder says")
            label = file.parent.name
        if config.caption and not text.is_file():
            raise StageError(f"{file}: expected its caption in {text.name} beside it")
        yield Example(name, file, _decoded(text.read_bytes(), str(text)).strip() if config.caption else "", label)


def _rows(metadata: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    try:
        with open(metadata, encoding="utf-8-sig", newline="") as file:
            if metadata.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                    yield number, row
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected an object")
                yield number, row
    except (csv.Error, ValueError, RecursionError) as error:
        raise StageError(f"{metadata}, near row {max(1, number)}: cannot be read ({error})") from None


def _webdataset(config: WebDataset) -> Iterator[Example]:
    for path in files_of(config.path, ("**/*.tar",)).values():
        try:
            with open(path, "rb") as file:
                for sample in tars.walk(file):
                    kind = next((kind for kind in IMAGES if kind in sample.members), None)
                    if kind is None:
                        continue
                    where = f"{path}, sample {sample.key!r}"
                    row = _fields(file, sample, where)
                    image = tars.read(file, sample.members[kind])
                    yield Example(where, image, _caption(row, config, where), _label(row, config, where))
        except ValueError as error:
            raise StageError(f"{path}: {error}") from None


def _fields(file: Any, sample: tars.TarSample, where: str) -> dict[str, Any]:
    """The texts of a sample by extension, and the keys of its .json member."""
    row: dict[str, Any] = {
        name: _decoded(tars.read(file, place), f"{where}, .{name}").strip()
        for name, place in sample.members.items()
        if name in ("txt", "cls", "json")
    }
    try:
        inside = json.loads(row.pop("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{where}: its .json is not JSON ({error})") from None
    return {**(inside if isinstance(inside, dict) else {}), **row}


def _parquet(config: ParquetImages) -> Iterator[Example]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [name for name in (config.image, config.caption, config.label) if name is not None]
    for path in files_of(config.path, ("**/*.parquet",)).values():
        try:
            file = pq.ParquetFile(path, memory_map=True)
            missing = next((name for name in columns if name not in file.schema_arrow.names), None)
            if missing is not None:
                raise StageError(f"{path}: no column {missing!r}; it has: {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    image = row[config.image]
                    image = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(image, bytes):
                        raise StageError(f"{where}: column {config.image!r} holds no encoded image")
                    yield Example(where, image, _caption(row, config, where), _label(row, config, where))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise StageError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


_READERS: dict[type[FileSet], Any] = {ImageFolder: _folder, WebDataset: _webdataset, ParquetImages: _parquet}


def _caption(row: Mapping[str, Any], config: Any, where: str) -> str:
    return "" if config.caption is None else _text(row, config.caption, where)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = f"{value!r:.40}" if name in row else f"it has: {', '.join(map(str, row))}"
        raise StageError(f"{where}: expected text in {name!r}; {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise StageError(f"{where}: {name!r} is not text that UTF-8 can hold") from None
    return value


def _label(row: Mapping[str, Any], config: Any, where: str) -> Any:
    value = None if config.label is None else row.get(config.label)
    if config.label is not None and not isinstance(value, str | int):
        raise StageError(f"{where}: expected a class in {config.label!r}, a whole number or text, not {value!r:.40}")
    return value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise StageError(f"{where}: not UTF-8") from None
