"""Inspects shards that have receipts. All statistics come from the receipts; tars are read only to hash them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.data.inspection.source import Listed, Source
from stages.data.receipts import read_receipt
from stages.data.records import ShardFacts

T = TypeVar("T")
COLUMNS = {"index": pa.int64(), "noise_hash": pa.uint64(), "prompt_hash": pa.uint64()}


@dataclass(frozen=True)
class Receipt:
    """The content of a receipt. noise, prompt: (N,), a 64-bit hash for each sample."""

    facts: ShardFacts
    noise: NDArray[np.uint64]
    prompt: NDArray[np.uint64]
    first: int
    """The smallest sample index."""


@dataclass(frozen=True)
class Checked:
    """A shard and its damage: `kind` is one of inspection.KINDS, and `problem` describes it. Both are None for an
    intact shard."""

    tar: Listed
    receipt: Receipt | None
    kind: str = ""
    problem: str | None = None


def check_shards(source: Source, tars: Iterable[Listed], deep: bool) -> Iterator[Checked]:
    """Check every shard, in order, against its receipt and the sealed list. `deep` also hashes every tar."""
    return _in_parallel(lambda tar: _check(source, tar, deep), tars)


def _check(source: Source, tar: Listed, deep: bool) -> Checked:
    size = source.sizes.get(tar.path)
    if size is None:
        return Checked(tar, None, "missing", "the tar does not exist")
    if tar.receipt not in source.sizes:
        return Checked(tar, None, "unreceipted", "it has no receipt; a shard without a receipt is ignored")
    try:
        receipt = _read(source, tar, size)
        facts = receipt.facts
        if size != facts.bytes or tar.bytes not in (None, size):
            raise ValueError(f"{size} bytes instead of {facts.bytes if tar.bytes is None else tar.bytes}")
        if tar.sha256 not in (None, facts.sha256) or tar.count not in (None, facts.count):
            raise ValueError("it is not the shard that was sealed")
        if deep and sha256(source, tar.path) != facts.sha256:
            raise ValueError("its content is not what the receipt says")
    except (OSError, ValueError, KeyError, OverflowError) as error:
        return Checked(tar, None, "corrupt", str(error))
    return Checked(tar, receipt)


def _read(source: Source, tar: Listed, size: int) -> Receipt:
    facts, rows = read_receipt(source.read(tar.receipt), list(COLUMNS), size)
    for name, kind in COLUMNS.items():
        if rows.schema.field(name).type != kind or rows[name].null_count:
            raise ValueError(f"its receipt's column {name} is not {kind}, or has nulls")
    index, noise, prompt = (rows[name].to_numpy() for name in COLUMNS)
    return Receipt(facts, noise, prompt, int(index.min()) if len(index) else 0)


def sha256(source: Source, path: str) -> str:
    digest = hashlib.sha256()
    for block in source.blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _in_parallel(function: Callable[[Listed], T], items: Iterable[Listed]) -> Iterator[T]:
    """Map a function over items in order, with one thread for each core. Hashing and parsing release the GIL."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        yield from threads.map(function, items)
