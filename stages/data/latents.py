"""Reads and writes the files of a `latents` artifact: the encoded images of an image set.

For each split, NAME.npy holds the latents (N, C, h, w). NAME.parquet has one row for each latent, in the same order:
caption, origin, and one int64 column for each label.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.base import StageError
from stages.data.files import publish, temporary_of, write_atomically

NAMES = {False: "training", True: "held_out"}
"""Whether a split is held out -> name of its files."""
ROW_GROUP = 65_536
NO_LABELS = ("caption", "origin")


@dataclass(frozen=True)
class LabelledLatents:
    """Encoded images with captions and class labels.

    latents: (N, C, h, w) in the stored dtype, memory-mapped. captions: N strings. labels: name -> (N,) int64 class
    numbers from 0.
    """

    latents: NDArray[np.floating]
    captions: list[str]
    labels: dict[str, NDArray[np.int64]]
    origins: NDArray[np.int64]
    """(N,): as in LabelledImages. Latents with equal numbers are not independent."""

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, index: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Read the latents at `index` from disk, as float32 (B, C, h, w)."""
        return np.array(self.latents[index], dtype=np.float32)


def read_latents(folder: Path, held_out: bool) -> LabelledLatents:
    """Read a split of a sealed `latents` artifact. Raises StageError if it is missing or damaged."""
    path = folder / NAMES[held_out]
    try:
        latents = np.load(path.with_suffix(".npy"), mmap_mode="r")
        table = pq.read_table(path.with_suffix(".parquet"))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StageError(f"{path}.npy and .parquet cannot be read as latents ({error})") from None
    if len(latents) != table.num_rows:
        raise StageError(f"{path}.npy has {len(latents)} latents, but {path}.parquet has {table.num_rows} rows")
    labels = {name: np.array(table[name]) for name in _labels(table.schema)}
    return LabelledLatents(latents, table["caption"].to_pylist(), labels, np.array(table["origin"]))


@contextmanager
def appending(path: Path, shape: tuple[int, ...], dtype: np.dtype, start: int) -> Iterator[IO[bytes]]:
    """Open the .npy file of an array of `shape` for writing raw values, positioned at row `start`. Create it if needed.

    It is a plain file, because writing to a memory map kills the process when the disk is full.
    """
    buffer = BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    if not path.exists():
        write_atomically(path, buffer.getvalue())
    with open(path, "r+b") as file:
        file.seek(buffer.tell() + start * dtype.itemsize * int(np.prod(shape[1:])))
        yield file


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of captions, origins and classes as Parquet, with constant memory. Raises StageError if there are no
    rows."""
    remaining, temporary = iter(rows), temporary_of(path)
    some = list(islice(remaining, ROW_GROUP))
    if not some:
        raise StageError(f"the image set has no images for the split {path.stem}")
    schema = pa.schema([(name, pa.string() if name == "caption" else pa.int64()) for name in some[0]])
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            while some:
                writer.write_table(pa.Table.from_pylist(some, schema))
                some = list(islice(remaining, ROW_GROUP))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def count_rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def count_classes(folder: Path) -> dict[str, int]:
    """Return label -> number of classes over both splits: the largest class number plus 1."""
    found: dict[str, int] = {}
    for name in NAMES.values():
        file = pq.ParquetFile(folder / f"{name}.parquet")
        labels = _labels(file.schema_arrow)
        for batch in file.iter_batches(ROW_GROUP, columns=labels):
            for label in labels:
                found[label] = max(found.get(label, 0), pc.max(batch[label]).as_py() + 1)
    return found


def _labels(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name not in NO_LABELS]
