"""Pools of shards, and the sealed list of the shards that a `pairs` artifact uses.

A pool is a folder of finished shards made with the same settings. Artifacts that differ only in `count` share a pool,
so raising `count` reuses every full shard. A shorter last shard lies in the subfolder `tail-LENGTH`, so it is never
mistaken for a full shard.
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
    """A shard to make: number `number`, with samples `start` to `stop` - 1, at the path `place` in the pool."""

    number: int
    start: int
    stop: int
    shard_size: int

    @property
    def place(self) -> str:
        """The path of the tar in the pool: NUMBER.tar, or tail-LENGTH/NUMBER.tar for a shorter last shard."""
        name = f"{self.number:05d}.tar"
        return name if self.stop - self.start == self.shard_size else f"tail-{self.stop - self.start}/{name}"

    def __str__(self) -> str:
        return f"shard {self.number:05d}"


def plan_shards(count: int, shard_size: int) -> list[ShardPlan]:
    """Return the shards that hold samples 0 to count - 1, in order."""
    return [
        ShardPlan(number, start, min(start + shard_size, count), shard_size)
        for number, start in enumerate(range(0, count, shard_size))
    ]


@dataclass(frozen=True)
class ListedShard:
    """A shard in a sealed artifact's list: the path of its tar, and the tar's samples, bytes and hash when sealed."""

    tar: Path
    count: int
    bytes: int
    sha256: str


def receipted(pool: Path) -> set[str]:
    """Return the paths in the pool, as in `ShardPlan.place`, of all shards that have a receipt."""
    return {path.relative_to(pool).with_suffix(".tar").as_posix() for path in pool.rglob("[0-9]*.parquet")}


def damage(folder: Path) -> str | None:
    """Return what is wrong with the files of a sealed list, as text. None if every file exists and has the sealed size.

    Tars are not read. Raises StageError if the list itself cannot be read.
    """
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
    """Whether the tar and its receipt exist and the tar has the sealed size. Reads neither file."""
    return _intact(str(shard.tar), shard.bytes, shard.sha256, math.inf)


def _intact(tar: str, size: int, sha256: str, sealed: float) -> bool:
    """As `intact`. Also reads the hash in a receipt that is newer than `sealed` (seconds since the epoch).

    Another artifact of the pool may have made the shard again since then. On other hardware its bytes may differ.
    """
    receipt = f"{tar.removesuffix('.tar')}.parquet"  # a string: for many shards, Path objects cost more than the disk
    try:
        if os.stat(tar).st_size != size:
            return False
        return os.stat(receipt).st_mtime <= sealed or _hash_in(receipt) == sha256
    except (OSError, ValueError):
        return False


def _hash_in(receipt: str) -> str:
    from stages.data.receipts import read_facts  # here, because planning rarely needs a receipt

    return read_facts(Path(receipt)).sha256


def write_list(folder: Path, pool: Path, shards: Sequence[ListedShard]) -> None:
    """Write the list of an artifact's shards to `folder`. Paths in it are relative to the pool."""
    entries = [
        {"tar": os.path.relpath(s.tar, pool), "count": s.count, "bytes": s.bytes, "sha256": s.sha256} for s in shards
    ]
    table = pool / PROMPTS
    prompts = {"file": PROMPTS, "bytes": table.stat().st_size, "sha256": sha256_of(table)}
    listed = {"pool": pool.name, "prompts": prompts, "shards": entries}
    write_atomically(folder / LIST, json.dumps(listed, indent=1).encode() + b"\n")


def pool_of(folder: Path) -> Path:
    """Return the pool of a sealed `pairs` artifact. Raises StageError if the artifact has no list."""
    return folder.parent / "pool" / str(_listed(folder)["pool"])


def read_list(folder: Path) -> list[ListedShard]:
    """Return the shards of a sealed `pairs` artifact. Raises StageError if the artifact has no list."""
    listed = _listed(folder)
    pool = pool_of(folder)
    return [ListedShard(pool / s["tar"], s["count"], s["bytes"], s["sha256"]) for s in listed["shards"]]


def parts(folder: Path) -> dict[str, str]:
    """Return path in the pool -> sha256 of the shards and the prompt table that a sealed artifact lists.

    Raises StageError if the artifact has no list.
    """
    listed = _listed(folder)
    prompts = listed["prompts"]
    return {prompts["file"]: prompts["sha256"]} | {shard["tar"]: shard["sha256"] for shard in listed["shards"]}


def discard(pool: Path, paths: Sequence[str]) -> None:
    """Delete files from the pool. A shard's receipt is deleted first: without a receipt, the shard does not exist."""
    for path in paths:
        (pool / path).with_suffix(".parquet").unlink(missing_ok=True)
        (pool / path).unlink(missing_ok=True)


def _listed(folder: Path) -> dict[str, Any]:
    """Read and check the list of an artifact. Raises StageError if it is missing or invalid."""
    try:
        return parse_list((folder / LIST).read_bytes(), str(folder / LIST))
    except FileNotFoundError:
        raise StageError(f"{folder} holds no sealed pairs: it has no {LIST}") from None


def parse_list(content: bytes, where: str) -> dict[str, Any]:
    """Parse and check a list. `where` is its path, for error messages.

    Raises StageError if it is invalid, or names files outside of its pool.
    """
    try:
        listed = json.loads(content)
        inside = [listed["pool"], listed["prompts"]["file"], *(shard["tar"] for shard in listed["shards"])]
        parts = [{"count": 0, **listed["prompts"]}, *listed["shards"]]
        kinds = [type(part[name]) for part in parts for name in ("count", "bytes")]
        hashes = [part["sha256"] for part in parts]
        if not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one) for one in hashes):
            raise ValueError("a sha256 is missing or invalid")
        outside = (p.startswith("/") or ".." in p.split("/") or "\0" in p for p in inside)
        if any(outside) or {*kinds} - {int}:
            raise ValueError("a path leads out of the pool, or a count or size is not an integer")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StageError(f"{where} cannot be read ({error})") from None
    return dict(listed)
