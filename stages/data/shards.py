"""Shards of pairs: a tar that any webdataset reader can read, and beside it a receipt that makes it exist.

The tar's bytes are a function of its pairs alone. The receipt (parquet, a row a sample) is published
after the tar: a shard without a valid receipt does not exist.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stages.data.files import publish, sha256_of, temporary_of
from stages.data.noise import hash64
from stages.data.records import Pair, ShardFacts
from stages.data.statistics import Moments, histogram

ARRAYS = ("noise", "latent")
METADATA = b"retort"


def write_shard(tar: Path, pairs: Sequence[Pair], sample_facts: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Publish `pairs` as `tar` and its receipt; return the tar's sha256.

    `sample_facts` go into every sample's .json member beside its index. Interrupted anywhere, it leaves
    no shard; called again, it leaves the same tar.
    """
    import webdataset as wds  # here, since it imports torch, which reading needs not wait for

    temporary = temporary_of(tar)
    try:
        with open(temporary, "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
            for pair in pairs:
                writer.write(_members(pair, sample_facts))
        offsets = _array_offsets(temporary)
        facts = ShardFacts(
            count=len(pairs),
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
            arrays={name: _array_facts([getattr(pair, name) for pair in pairs]) for name in ARRAYS},
            provenance=provenance,
        )
        publish(temporary, tar)
    finally:
        temporary.unlink(missing_ok=True)
    _write_receipt(receipt_of(tar), pairs, offsets, facts)
    return facts.sha256


def receipt_of(tar: Path) -> Path:
    return tar.with_suffix(".parquet")


def read_facts(receipt: Path) -> ShardFacts:
    """The shard's facts: reads the file's footer only. Raises OSError or ValueError on a damaged file."""
    metadata = pq.read_metadata(receipt).metadata or {}
    if METADATA not in metadata:
        raise ValueError(f"{receipt} is no receipt of a shard of pairs")
    try:
        return ShardFacts(**json.loads(metadata[METADATA]))
    except TypeError as error:
        raise ValueError(f"{receipt} is of another version of Retort: {error}") from None


def read_rows(receipt: Path, columns: list[str] | None = None) -> pa.Table:
    """A row a sample: index, key, prompt, offsets, hash, mean, std, absmax; or some `columns` of it."""
    return pq.read_table(receipt, columns=columns, memory_map=True)


def valid_facts(tar: Path) -> ShardFacts | None:
    """The facts of a shard whose receipt can be read and whose tar has the recorded size; else None."""
    try:
        facts = read_facts(receipt_of(tar))
        return facts if tar.stat().st_size == facts.bytes else None
    except (OSError, ValueError):
        return None


def _members(pair: Pair, sample_facts: dict[str, Any]) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": pair.key}
    for name in ARRAYS:
        buffer = BytesIO()
        np.save(buffer, getattr(pair, name), allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    members["txt"] = pair.prompt.encode("utf-8")
    members["json"] = json.dumps({"index": pair.index, **sample_facts}, sort_keys=True).encode("utf-8")
    return members


def _array_offsets(tar: Path) -> dict[str, list[int]]:
    """Where each array's raw numbers begin in the tar, past the .npy header."""
    offsets: dict[str, list[int]] = {name: [] for name in ARRAYS}
    with tarfile.open(tar) as archive, open(tar, "rb") as file:
        for member in archive:
            extension = member.name.partition(".")[2]
            if extension.removesuffix(".npy") in offsets:
                file.seek(member.offset_data)
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                offsets[extension.removesuffix(".npy")].append(file.tell())
    return offsets


def _array_facts(arrays: Sequence[NDArray[np.floating]]) -> dict[str, Any]:
    values = np.stack(arrays)
    return {
        "dtype": values.dtype.name,
        "shape": list(values.shape[1:]),
        "moments": Moments.of(values).as_dict(),
        "histogram": histogram(values),
    }


def _write_receipt(receipt: Path, pairs: Sequence[Pair], offsets: dict[str, list[int]], facts: ShardFacts) -> None:
    columns: dict[str, Any] = {
        "index": pa.array([pair.index for pair in pairs], pa.int64()),
        "key": [pair.key for pair in pairs],
        "prompt": [pair.prompt for pair in pairs],
        "noise_hash": pa.array([hash64(pair.noise) for pair in pairs], pa.uint64()),
    }
    for name in ARRAYS:
        moments = [Moments.of(getattr(pair, name)) for pair in pairs]
        columns[f"{name}_offset"] = pa.array(offsets[name], pa.int64())
        columns[f"{name}_mean"] = [m.mean for m in moments]
        columns[f"{name}_std"] = [m.std for m in moments]
        columns[f"{name}_absmax"] = [m.absmax for m in moments]
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(facts.as_dict(), sort_keys=True)})
    temporary = temporary_of(receipt)
    try:
        pq.write_table(table, temporary)
        publish(temporary, receipt)
    finally:
        temporary.unlink(missing_ok=True)
