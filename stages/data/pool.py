"""Pools and lists of shards: which shards a count asks for, which are there, and the list that is sealed.

A pool is a folder of finished shards that differ in nothing but their number, so that raising `count`
reuses every full shard. A last, shorter shard lives in a folder of its own, named by its length, and
is never taken for a full one.
"""

from __future__ import annotations

import json
import math
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


def receipted(pool: Path) -> set[str]:
    """Places below the pool, as ShardPlan names them, whose receipts are there."""
    return {path.relative_to(pool).with_suffix(".tar").as_posix() for path in pool.rglob("[0-9]*.parquet")}


def damage(folder: Path) -> str | None:
    """Why a sealed list cannot be believed, in words; None if all it names is there, and of the sealed size. Tars are
    not read. Raises StageError if the list itself cannot be read."""
    listed = _listed(folder)
    pool, sealed = folder.parent / "pool" / listed["pool"], (folder / LIST).stat().st_mtime
    try:
        prompts = (pool / PROMPTS).stat().st_size == listed["prompts"]["bytes"]
    except OSError:
        prompts = False
    if not prompts:
        return "the table of its prompts is missing or changed"
    bad = [s["tar"] for s in listed["shards"] if not _intact(f"{pool}/{s['tar']}", s["bytes"], s["sha256"], sealed)]
    if not bad:
        return None
    return f"{len(bad)} of {len(listed['shards'])} shards are missing or changed, such as {PurePath(bad[0]).name}"


def intact(shard: ListedShard) -> bool:
    """Whether tar and receipt are there, and the tar of the sealed size. Reads neither."""
    return _intact(str(shard.tar), shard.bytes, shard.sha256, math.inf)


def _intact(tar: str, size: int, sha256: str, sealed: float) -> bool:
    """The same; but a receipt newer than `sealed`, in seconds of the epoch, is read: the shard may have been made
    again, for another artifact of the pool, and on other hardware with other bytes."""
    receipt = f"{tar.removesuffix('.tar')}.parquet"  # strings: paths cost more than the disk, and there are many
    try:
        if os.stat(tar).st_size != size:
            return False
        return os.stat(receipt).st_mtime <= sealed or _hash_in(receipt) == sha256
    except (OSError, ValueError):
        return False


def _hash_in(receipt: str) -> str:
    from stages.data.receipts import read_facts  # here: planning reads no receipts but these

    return read_facts(Path(receipt)).sha256


def write_list(folder: Path, pool: Path, shards: Sequence[ListedShard]) -> None:
    """Seal the list of an artifact's shards into `folder`, by paths relative to it."""
    entries = [
        {"tar": os.path.relpath(s.tar, pool), "count": s.count, "bytes": s.bytes, "sha256": s.sha256} for s in shards
    ]
    table = pool / PROMPTS
    prompts = {"file": PROMPTS, "bytes": table.stat().st_size, "sha256": sha256_of(table)}
    listed = {"pool": pool.name, "prompts": prompts, "shards": entries}
    write_atomically(folder / LIST, json.dumps(listed, indent=1).encode() + b"\n")


def pool_of(folder: Path) -> Path:
    """The pool in which the shards of a sealed `pairs` artifact lie. Raises StageError if it has no list."""
    return folder.parent / "pool" / str(_listed(folder)["pool"])


def read_list(folder: Path) -> list[ListedShard]:
    """The shards of a sealed `pairs` artifact. Raises StageError if the list is not there."""
    listed = _listed(folder)
    pool = pool_of(folder)
    return [ListedShard(pool / s["tar"], s["count"], s["bytes"], s["sha256"]) for s in listed["shards"]]


def parts(folder: Path) -> dict[str, str]:
    """Path below the pool -> sha256, of the shards and the table of prompts that a sealed artifact lists. Raises
    StageError if the list is not there."""
    listed = _listed(folder)
    prompts = listed["prompts"]
    return {prompts["file"]: prompts["sha256"]} | {shard["tar"]: shard["sha256"] for shard in listed["shards"]}


def discard(pool: Path, paths: Sequence[str]) -> None:
    """Remove parts. A shard's receipt goes first, and with it the shard."""
    for path in paths:
        (pool / path).with_suffix(".parquet").unlink(missing_ok=True)
        (pool / path).unlink(missing_ok=True)


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
        outside = (p.startswith("/") or ".." in p.split("/") or "\0" in p for p in inside)
        if any(outside) or {*kinds} - {int}:
            raise ValueError("it names files outside of its pool, or no sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StageError(f"{where} cannot be read ({error})") from None
    return dict(listed)
