"""Receipts: a Parquet file beside each shard, with one row for each sample. Its metadata describes the whole shard.

A receipt contains the sha256 of its own other bytes (the seal), so that damage to the receipt itself is detected.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.data.files import publish, temporary_of
from stages.data.noise import hash64
from stages.data.records import Pair, ShardFacts

METADATA = b"retort"
SEAL = b"retort-receipt-sha256:"
UNSEALED = SEAL + b"0" * 64


def receipt_of(tar: Path) -> Path:
    return tar.with_suffix(".parquet")


def write_receipt(receipt: Path, pairs: Sequence[Pair], offsets: dict[str, list[int]], facts: ShardFacts) -> None:
    """Write the receipt of a shard whose tar is already published.

    offsets: array name -> for each sample, the byte in the tar where the array's raw values begin.
    """
    columns: dict[str, Any] = {
        "index": pa.array([pair.index for pair in pairs], pa.int64()),
        "key": [pair.key for pair in pairs],
        "prompt": [pair.prompt for pair in pairs],
        "prompt_hash": pa.array([hash64(pair.prompt.encode("utf-8")) for pair in pairs], pa.uint64()),
        "noise_hash": pa.array([hash64(pair.arrays["noise"].tobytes()) for pair in pairs], pa.uint64()),
    }
    for name in facts.arrays:
        values = np.stack([pair.arrays[name] for pair in pairs]).reshape(len(pairs), -1).astype(np.float64)
        columns[f"{name}_offset"] = pa.array(offsets[name], pa.int64())
        columns[f"{name}_mean"] = values.mean(1)
        columns[f"{name}_std"] = values.std(1)
        columns[f"{name}_absmax"] = np.abs(values).max(1)
    table, buffer = pa.table(columns), pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA: facts.model_dump_json(), b"seal": UNSEALED})
    temporary = temporary_of(receipt)
    try:
        temporary.write_bytes(_seal(buffer.getvalue().to_pybytes()))
        publish(temporary, receipt)
    finally:
        temporary.unlink(missing_ok=True)


def _seal(content: bytes) -> bytes:
    before, mark, after = content.rpartition(UNSEALED)
    assert mark
    return before + SEAL + hashlib.sha256(content).hexdigest().encode() + after


def check_seal(content: bytes) -> None:
    """Raise ValueError if a receipt's bytes changed since it was written, or are not a receipt."""
    place = content.rfind(SEAL)
    seal = content[place : place + len(UNSEALED)]
    if place < 0 or hashlib.sha256(content[:place] + UNSEALED + content[place + len(seal) :]).hexdigest() != seal[
        len(SEAL) :
    ].decode("ascii", "replace"):
        raise ValueError("the receipt is damaged, or was not written by Retort")


def parse_facts(metadata: pq.FileMetaData) -> ShardFacts:
    """Return the description of a shard from the footer of its receipt. Raises ValueError if there is none."""
    found = (metadata.metadata or {}).get(METADATA)
    if found is None:
        raise ValueError("not the receipt of a shard of pairs")
    try:
        return ShardFacts.model_validate_json(found)
    except ValueError:
        raise ValueError("the receipt was written by another version of Retort") from None


def read_facts(receipt: Path) -> ShardFacts:
    """As `parse_facts`, for a file. Reads only its footer. Raises OSError or ValueError if the file is damaged."""
    try:
        return parse_facts(pq.read_metadata(receipt))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{receipt}: {error}") from None


def read_receipt(content: bytes, columns: list[str], tar_bytes: int) -> tuple[ShardFacts, pa.Table]:
    """Check the seal of a receipt, then return its description of the shard and the given columns.

    content: the receipt's bytes. Raises ValueError if it is damaged, or has more rows than fit into a tar of
    `tar_bytes`. Raises KeyError if a column is missing.
    """
    check_seal(content)
    try:
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=["prompt"] if "prompt" in columns else None)
        facts = parse_facts(file.metadata)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        rows = sum(group.num_rows for group in groups)
        if rows != facts.count or rows * tarfile.BLOCKSIZE > tar_bytes:  # a small hostile file can claim millions
            raise ValueError(f"its receipt has {rows} rows for {facts.count} samples in {tar_bytes} bytes")
        absent = next((name for name in columns if name not in file.schema_arrow.names), None)
        if absent is not None:
            raise KeyError(absent)
        wide = [
            name
            for name in columns
            if name != "prompt" and not pa.types.is_primitive(file.schema_arrow.field(name).type)
        ]
        if wide:
            raise ValueError(f"its receipt's column {wide[0]} does not hold numbers")
        return facts, _with_prompts(file.read(columns=columns, use_threads=False), tar_bytes)
    except pa.ArrowException as error:
        raise ValueError(f"its receipt cannot be read ({str(error).splitlines()[0]})") from None


def _with_prompts(rows: pa.Table, tar_bytes: int) -> pa.Table:
    """Decode the dictionary-encoded prompts to strings.

    Raises ValueError if they are longer than the tar, which contains them too: in a hostile file, a dictionary with one
    long prompt may expand to gigabytes.
    """
    place = rows.schema.get_field_index("prompt")
    if place < 0 or not pa.types.is_dictionary(rows.schema.field(place).type):
        return rows
    prompts = rows.column(place)
    lengths = (pc.sum(pc.take(pc.binary_length(part.dictionary), part.indices)).as_py() for part in prompts.chunks)
    if sum(filter(None, lengths)) > tar_bytes:
        raise ValueError(f"its receipt has prompts longer than a tar of {tar_bytes} bytes")
    return rows.set_column(place, "prompt", prompts.cast(pa.string()))


def read_rows(receipt: Path, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of a receipt, one for each sample, or only some `columns` of them.

    Columns: index, key, prompt, prompt_hash, noise_hash; for each array NAME_offset, NAME_mean, NAME_std, NAME_absmax.
    """
    return pq.read_table(receipt, columns=columns, memory_map=True)


def valid_facts(tar: Path) -> ShardFacts | None:
    """Return a shard's description if its receipt is readable and its tar has the recorded size, else None."""
    try:
        facts = read_facts(receipt_of(tar))
        return facts if tar.stat().st_size == facts.bytes else None
    except (OSError, ValueError):
        return None
