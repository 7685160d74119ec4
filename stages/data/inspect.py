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

SAME = ("sampler", "dtype", "noise", "seed", "teacher", "device")
"""Provenance that all shards of one dataset should share."""


def inspect_shards(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Counts, statistics and provenance of a sealed `pairs` artifact or of any folder with shards and receipts.

    `damaged` maps a tar to what is wrong with it; `deep` also re-hashes every tar. Raises StageError when
    there is no shard at all.
    """
    damaged: dict[str, str] = {}
    good: list[tuple[Path, ShardFacts]] = []
    for tar in _tars(folder):
        facts = _facts(tar, damaged, deep)
        if facts is not None:
            good.append((tar, facts))
    if not good and not damaged:
        raise StageError(f"{folder} holds no shards: neither {pool.LIST} nor any receipt (.parquet) is there")
    hashes = [read_rows(receipt_of(tar))["noise_hash"].to_numpy() for tar, _ in good]
    prompts = [read_rows(receipt_of(tar))["prompt"] for tar, _ in good]
    return {
        "count": sum(facts.count for _, facts in good),
        "shards": len(good),
        "bytes": sum(facts.bytes for _, facts in good),
        "distinct_prompts": len(pc.unique(pa.chunked_array([c for p in prompts for c in p.chunks]))) if prompts else 0,
        "repeated_noises": int(sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes)))) if hashes else 0,
        "arrays": {name: _array(name, [facts for _, facts in good]) for name in ARRAYS} if good else {},
        "provenance": _provenance([facts for _, facts in good]),
        "damaged": damaged,
    }


def _tars(folder: Path) -> Iterator[Path]:
    if (folder / pool.LIST).exists():
        yield from (shard.tar for shard in pool.read_list(folder))
    else:
        yield from (receipt.with_suffix(".tar") for receipt in sorted(folder.rglob("*.parquet")))


def _facts(tar: Path, damaged: dict[str, str], deep: bool) -> ShardFacts | None:
    try:
        facts = read_facts(receipt_of(tar))
    except (OSError, ValueError) as error:
        damaged[str(tar)] = f"its receipt cannot be read: {error}"
        return None
    size = tar.stat().st_size if tar.exists() else None
    if size != facts.bytes:
        damaged[str(tar)] = "missing" if size is None else f"{size} bytes instead of {facts.bytes}"
    elif deep and sha256_of(tar) != facts.sha256:
        damaged[str(tar)] = "its content is not what the receipt says"
    else:
        return facts
    return None


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
