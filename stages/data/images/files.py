"""Streams the user's own images from folders, webdataset shards and Parquet files.

Every problem raises a StageError that names the file, the row or key, and what was expected.
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

IMAGES = ("jpg", "jpeg", "png", "webp")
METADATA = ("metadata.csv", "metadata.jsonl")
BY_FOLDER = "folder"
FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that Pillow may read. Some of its other readers start programs."""
ROWS = 64


@dataclass(frozen=True)
class Example:
    """An encoded image (bytes, or the path of a file), its caption and its label. `where` names its place in errors."""

    where: str
    encoded: bytes | Path
    caption: str
    label: Any

    def pixels(self, size: int) -> NDArray[np.uint8]:
        """Decode to (3, size, size) uint8 in RGB: scale the shorter side to `size`, then crop the middle square.

        Raises StageError if it cannot be decoded.
        """
        from PIL import Image, ImageOps

        try:
            source = self.encoded if isinstance(self.encoded, Path) else BytesIO(self.encoded)
            with Image.open(source, formats=FORMATS) as opened:
                upright = ImageOps.exif_transpose(opened)
                if upright.mode.startswith("I"):  # 16-bit pixels: `convert` would clip them instead of scaling them
                    upright = Image.fromarray((np.asarray(upright) / 257.0).round().clip(0, 255).astype(np.uint8))
                upright = upright.convert("RGB")
                square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise StageError(f"{self.where}: the image cannot be read ({error})") from None
        return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)


def folder(path: str, caption: str | None, label: str | None) -> Iterator[Example]:
    """Yield the images below a folder, with captions and labels from a metadata file or from text files and folders."""
    root = Path(path)
    metadata = next((root / name for name in METADATA if (root / name).exists()), None)
    if metadata is not None:
        for number, row in _rows(metadata):
            where = f"{metadata}, row {number}"
            file = root / _text(row, "file_name", where)
            try:
                inside = file.resolve().is_relative_to(root.resolve()) and file.is_file()
            except (OSError, ValueError):
                inside = False
            if not inside:
                raise StageError(f"{where}: file_name {row['file_name']!r:.80} is not a file in {root}")
            yield Example(str(file), file, _caption(row, caption, where), _label(row, label, where))
        return
    if label not in (None, BY_FOLDER) or caption not in (None, "txt"):
        wanted = label if label not in (None, BY_FOLDER) else caption
        raise StageError(
            f"image set {root}: column {wanted!r} needs {' or '.join(METADATA)}. Without one, set caption: txt for "
            "text files beside the images, caption: null for no captions, label: folder for one folder per class"
        )
    for name, file in files_of(path, tuple(f"**/*.{kind}" for kind in IMAGES)).items():
        text = file.with_suffix(".txt")
        if label and file.parent == root:
            raise StageError(f"{file}: label: folder needs each image in a folder that is named after its class")
        if caption and not text.is_file():
            raise StageError(f"{file}: there is no caption file {text.name} beside it")
        words = _decoded(text.read_bytes(), str(text)).strip() if caption else ""
        yield Example(name, file, words, file.parent.name if label else None)


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


def webdataset(path: str, caption: str | None, label: str | None) -> Iterator[Example]:
    """Yield the samples of .tar files that contain an image."""
    for tar in files_of(path, ("**/*.tar",)).values():
        try:
            with open(tar, "rb") as file:
                for sample in tars.walk(file):
                    kind = next((kind for kind in IMAGES if kind in sample.members), None)
                    if kind is None:
                        continue
                    where = f"{tar}, sample {sample.key!r}"
                    row = _fields(file, sample, where)
                    image = tars.read(file, sample.members[kind])
                    yield Example(where, image, _caption(row, caption, where), _label(row, label, where))
        except ValueError as error:
            raise StageError(f"{tar}: {error}") from None


def _fields(file: Any, sample: tars.TarSample, where: str) -> dict[str, Any]:
    """Return the text members of a sample by extension, and the keys of its .json member."""
    row: dict[str, Any] = {
        name: _decoded(tars.read(file, place), f"{where}, .{name}").strip()
        for name, place in sample.members.items()
        if name in ("txt", "cls", "json")
    }
    try:
        inside = json.loads(row.pop("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{where}: its .json member is not valid JSON ({error})") from None
    return {**(inside if isinstance(inside, dict) else {}), **row}


def parquet(path: str, image: str, caption: str | None, label: str | None) -> Iterator[Example]:
    """Yield the rows of .parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [name for name in (image, caption, label) if name is not None]
    for part in files_of(path, ("**/*.parquet",)).values():
        try:
            file = pq.ParquetFile(part, memory_map=True)
            missing = next((name for name in columns if name not in file.schema_arrow.names), None)
            if missing is not None:
                raise StageError(f"{part}: no column {missing!r}; it has: {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{part}, row {number}"
                    encoded = row[image]
                    encoded = encoded.get("bytes") if isinstance(encoded, dict) else encoded
                    if not isinstance(encoded, bytes):
                        raise StageError(f"{where}: column {image!r} holds no encoded image")
                    yield Example(where, encoded, _caption(row, caption, where), _label(row, label, where))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise StageError(f"{part}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _caption(row: Mapping[str, Any], name: str | None, where: str) -> str:
    return "" if name is None else _text(row, name, where)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = f"found {value!r:.40}" if name in row else f"it has: {', '.join(map(str, row))}"
        raise StageError(f"{where}: expected text in {name!r}; {found}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise StageError(f"{where}: {name!r} cannot be encoded as UTF-8") from None
    return value


def _label(row: Mapping[str, Any], name: str | None, where: str) -> Any:
    value = None if name is None else row.get(name)
    if name is not None and not isinstance(value, str | int):
        raise StageError(f"{where}: expected a class in {name!r}, an integer or text, not {value!r:.40}")
    return value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise StageError(f"{where}: not UTF-8") from None
