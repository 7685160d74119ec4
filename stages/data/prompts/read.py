"""Streams prompts from files: one line, or one batch of rows, is in memory at a time.

Every problem raises a StageError that names the file, the row or line, and what was expected there. Rows are counted
from 1, without the header.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from stages.base import StageError
from stages.data.files import files_of
from stages.data.prompts.config import DEFAULT_COLUMN, FORMATS, PATTERNS, Prompts

BATCH = 4096


def read_prompts(source: Prompts) -> Iterator[list[str]]:
    """Yield batches of prompts, in order of file names and rows. Raises StageError if none exist or can be read."""
    if source.images is not None:
        from stages.data.images.load import captions

        yield from _batches(captions(source.images))
        return
    assert source.path is not None
    some = False
    for path in _files(source.path):
        try:
            batches = _read(path, source.column or DEFAULT_COLUMN)
            first = next(batches, None)
            if not first:
                raise StageError(f"prompts {path}: empty; expected at least one prompt")
            yield from chain([first], batches)
            some = True
        except OSError as error:
            raise StageError(f"prompts {path} cannot be read: {error.strerror or error}") from None
    if not some:
        raise StageError(f"prompts {source.path}: no prompts found")


def _files(source: str) -> list[Path]:
    try:
        found = files_of(source, PATTERNS)
    except FileNotFoundError as error:
        raise StageError(f"prompts {error}; expected {', '.join(FORMATS)}") from None
    kinds = sorted({path.suffix.lower() for path in found.values()})
    if len(kinds) > 1:
        raise StageError(f"prompts {source}: files of several kinds ({', '.join(kinds)}); name one kind with a glob")
    return list(found.values())


def _read(path: Path, column: str) -> Iterator[list[str]]:
    match path.suffix.lower():
        case ".parquet":
            return _parquet(path, column)
        case ".csv":
            return _batches(_checked(path, _csv(path, column)))
        case ".jsonl":
            return _batches(_checked(path, _jsonl(path, column)))
        case ".txt":
            return _batches(_checked(path, enumerate(_lines(path), 1), "line"))
    raise StageError(f"prompts {path}: expected {', '.join(FORMATS)}")


def _batches(prompts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(prompts, BATCH)):
        yield batch


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise StageError(f"prompts {path}, line {number}: not UTF-8") from None


def _checked(path: Path, rows: Iterator[tuple[int, object]], unit: str = "row") -> Iterator[str]:
    """Yield the prompts of numbered rows. Raises StageError for one that is not text, blank, or not valid UTF-8."""
    for number, value in rows:
        if not isinstance(value, str):
            found = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
            raise StageError(f"prompts {path}, {unit} {number}: {found}; expected text")
        if not value.strip():
            raise StageError(f"prompts {path}, {unit} {number}: empty; expected a prompt")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise StageError(f"prompts {path}, {unit} {number}: cannot be encoded as UTF-8") from None
        yield value


def _csv(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    rows = csv.reader((line + "\n" for line in _lines(path)), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        place = _place(path, column, header)
        for number, row in enumerate(rows, 1):
            if row:  # blank lines are skipped
                yield number, row[place] if place < len(row) else None
    except csv.Error as error:
        raise StageError(f"prompts {path}, line {rows.line_num}: not CSV ({error})") from None


def _jsonl(path: Path, column: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StageError(f"prompts {path}, row {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise StageError(f"prompts {path}, row {number}: expected an object with {column!r}, not {line:.40}")
        _place(path, column, list(row), f", row {number}")
        yield number, row[column]


def _parquet(path: Path, column: str) -> Iterator[list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
        names = file.schema_arrow.names
        _place(path, column, names)
        kind = file.schema_arrow.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise StageError(f"prompts {path}: column {column!r} is {kind}; expected text")
        before = 0
        for batch in file.iter_batches(BATCH, columns=[column]):
            yield list(_checked(path, enumerate(batch.column(0).to_pylist(), before + 1)))
            before += len(batch)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise StageError(f"prompts {path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _place(path: Path, column: str, names: list[str], where: str = "") -> int:
    if column not in names:
        raise StageError(
            f"prompts {path}{where}: no column {column!r}; it has: {', '.join(names)}. Name one with prompts.column"
        )
    return names.index(column)
