"""Pools and lists of shards: which shards a count asks for, which are there, and the list that is sealed.

A pool is a folder of finished shards that differ in nothing but their number, so that raising `count`
reuses every full shard. A last, shorter shard lives in a folder of its own, named by its length, and
is never taken for a full one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from stages.base import StageError
from stages.data.files import sha256_of, write_atomically

LIST = "receipts.json"
PROMPTS = "prompts.arrow"


@dataclass(frozen=True)
class ShardPlan:
    """Shard `number` holds the samples from `start` up to `stop`, at `place` below the pool."""

    number: int
    start: int
    stop: int
    shard_size: int

    @property
    def place(self) -> str:
        name = f"{self.number:05d}.tar"
        return name if self.stop - self.start == self.shard_size else f"tail-{self.stop - self.start}/{name}"

    def __str__(self) -> str:
        return f"shard {self.number:05d}"


def plan_shards(count: int, shard_size: int) -> list[ShardPlan]:
    """The shards that hold samples 0 to count - 1, in order."""
    return [
        ShardPlan(number, start, min(start + shard_size, count), shard_size)
        for number, start in enumerate(range(0, count, shard_size))
    ]


@dataclass(frozen=True)
class ListedShard:
    """A shard as a sealed artifact lists it: where the tar lies, and what it was when it was sealed."""

    tar: Path
    count: int
    bytes: int
    sha256: str


def intact(shard: ListedShard) -> bool:
    """Whether tar and receipt are there, and the tar of the sealed size. Reads neither."""
    try:
        return shard.tar.stat().st_size == shard.bytes and shard.tar.with_suffix(".parquet").exists()
    except OSError:
        return False


def remade(shard: ListedShard, since: float) -> bool:
    """Whether the shard was made again after `since`, seconds of the epoch, and came out with other bytes: on other
    hardware, for another artifact of the pool. Only receipts that are newer are read."""
    from stages.data.receipts import read_facts, receipt_of  # here: planning reads no receipts but these

    receipt = receipt_of(shard.tar)
    try:
        return receipt.stat().st_mtime > since and read_facts(receipt).sha256 != shard.sha256
    except (OSError, ValueError):
        return True


def write_list(folder: Path, pool: Path, shards: Sequence[ListedShard]) -> None:
    """Seal the list of an artifact's shards into `folder`, by paths relative to it."""
    entries = [
        {"tar": os.path.relpath(s.tar, pool), "count": s.count, "bytes": s.bytes, "sha256": s.sha256} for s in shards
    ]
    table = pool / PROMPTS
    prompts = {"file": PROMPTS, "bytes": table.stat().st_size, "sha256": sha256_of(table)}
    listed = {"pool": pool.name, "prompts": prompts, "shards": entries}
    write_atomically(folder / LIST, json.dumps(listed, indent=1).encode() + b"\n")


def prompts_intact(folder: Path) -> bool:
    """Whether the pool's table of prompts is there, and of the sealed size."""
    try:
        return (pool_of(folder) / PROMPTS).stat().st_size == _listed(folder)["prompts"]["bytes"]
    except OSError:
        return False


def pool_of(folder: Path) -> Path:
    """The pool in which the shards of a sealed `pairs` artifact lie. Raises StageError if it has no list."""
    return folder.parent / "pool" / str(_listed(folder)["pool"])


def read_list(folder: Path) -> list[ListedShard]:
    """The shards of a sealed `pairs` artifact. Raises StageError if the list is not there."""
    listed = _listed(folder)
    pool = pool_of(folder)
    return [ListedShard(pool / s["tar"], s["count"], s["bytes"], s["sha256"]) for s in listed["shards"]]


def _listed(folder: Path) -> dict[str, Any]:
    """The list, checked: it names a pool beside its folder, and shards inside that. Raises StageError."""
    try:
        return parse_list((folder / LIST).read_bytes(), str(folder / LIST))
    except FileNotFoundError:
        raise StageError(f"{folder} holds no sealed pairs: it has no {LIST}") from None


def parse_list(content: bytes, where: str) -> dict[str, Any]:
    """As `_listed`, of a file's bytes."""
    try:
        listed = json.loads(content)
        inside = [listed["pool"], listed["prompts"]["file"], *(shard["tar"] for shard in listed["shards"])]
        parts = [{"count": 0, **listed["prompts"]}, *listed["shards"]]
        kinds = [type(part[name]) for part in parts for name in ("count", "bytes")]
        hashes = [part["sha256"] for part in parts]
        if not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
            raise ValueError("it names no hashes")
        outside = (PurePath(p).is_absolute() or ".." in PurePath(p).parts or "\0" in p for p in inside)
        if any(outside) or {*kinds} - {int}:
            raise ValueError("it names files outside of its pool, or no sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StageError(f"{where} cannot be read ({error})") from None
    return dict(listed)
