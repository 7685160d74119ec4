"""What is in a dataset of pairs, read from its receipts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import StageError
from stages.data import pool
from stages.data.files import sha256_of
from stages.data.records import ShardFacts
from stages.data.shards import ARRAYS, read_facts, read_rows, receipt_of
from stages.data.statistics import Moments

SAME = ("sampler", "dtype", "noise", "seed", "prompts", "teacher", "device", "execution", "versions")
"""Provenance that all shards of one dataset should share."""


def inspect_shards(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Counts, statistics and provenance of a sealed `pairs` artifact or of any folder with shards and receipts.

    `damaged` maps a tar to what is wrong with it; `deep` also re-hashes every tar. Raises StageError when
    there is no shard at all.
    """
    damaged: dict[str, str] = {}
    facts: list[ShardFacts] = []
    hashes: list[np.ndarray] = []
    prompts: list[pa.Array] = []
    for tar, sealed in _tars(folder):
        try:
            found = _facts(tar, sealed, deep)
            rows = read_rows(receipt_of(tar), ["noise_hash", "prompt"])
        except (OSError, ValueError) as error:
            damaged[str(tar)] = str(error)
            continue
        facts.append(found)
        hashes.append(rows["noise_hash"].to_numpy())
        prompts += rows["prompt"].chunks
    if not facts and not damaged:
        raise StageError(f"{folder} holds no shards: neither {pool.LIST} nor any receipt (.parquet) is there")
    return {
        "count": sum(one.count for one in facts),
        "shards": len(facts),
        "bytes": sum(one.bytes for one in facts),
        "distinct_prompts": len(pc.unique(pa.chunked_array(prompts, pa.string()))),
        "repeated_noises": sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes))) if hashes else 0,
        "arrays": {name: _array(name, facts) for name in ARRAYS} if facts else {},
        "provenance": _provenance(facts),
        "damaged": damaged,
    }


def _tars(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Tars with the sha256 they were sealed with, if they were."""
    if (folder / pool.LIST).exists():
        yield from ((shard.tar, shard.sha256) for shard in pool.read_list(folder))
    else:
        yield from ((receipt.with_suffix(".tar"), None) for receipt in sorted(folder.rglob("*.parquet")))


def _facts(tar: Path, sealed: str | None, deep: bool) -> ShardFacts:
    """Raises OSError or ValueError, in words, for a shard that is not what its receipt or its list says."""
    facts = read_facts(receipt_of(tar))
    size = tar.stat().st_size
    if size != facts.bytes:
        raise ValueError(f"{size} bytes instead of {facts.bytes}")
    if sealed not in (None, facts.sha256):
        raise ValueError("another shard than the one that was sealed")
    if deep and sha256_of(tar) != facts.sha256:
        raise ValueError("its content is not what the receipt says")
    return facts


def _array(name: str, facts: list[ShardFacts]) -> dict[str, Any]:
    moments = Moments()
    counts = np.zeros(len(facts[0].arrays[name]["histogram"]), dtype=np.int64)
    for one in facts:
        moments = moments.merge(Moments(**one.arrays[name]["moments"]))
        counts += np.array(one.arrays[name]["histogram"])
    about = facts[0].arrays[name]
    return {
        "dtype": about["dtype"],
        "shape": about["shape"],
        "mean": moments.mean,
        "std": moments.std,
        "absmax": moments.absmax,
        "histogram": counts.tolist(),
    }


def _provenance(facts: list[ShardFacts]) -> dict[str, Any]:
    """What all shards share; for what they do not, the values there are."""
    shared: dict[str, Any] = {}
    for name in SAME:
        values = [one.provenance.get(name) for one in facts]
        distinct = [v for i, v in enumerate(values) if v not in values[:i]]
        shared[name] = distinct[0] if len(distinct) == 1 else {"differs": distinct}
    shared["solver_seconds"] = round(sum(one.provenance.get("seconds", 0.0) for one in facts), 1)
    return shared
