"""Compares the speed of Retort's reader with that of webdataset, on the same shards, in random order, in one process.

    python -m tests.benchmarks.reader [--count 4096]

The pairs are float16, 4x64x64. webdataset can only shuffle in a buffer, which here is as large as a shard. Both readers
return arrays and prompts. After a first round, which fills the page cache, they run three rounds in turn, and the
medians count. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset as wds

from stages.data.noise import noise_for
from stages.data.order import ShuffledOrder
from stages.data.pool import ListedShard
from stages.data.reader import PairReader
from stages.data.records import Pair
from stages.data.shards import write_shard

SHAPE, SHARD, BATCH = (4, 64, 64), 512, 64


def make(folder: Path, count: int) -> list[ListedShard]:
    listed = []
    for number, start in enumerate(range(0, count, SHARD)):
        pairs = [
            Pair(i, f"prompt {i}", {"noise": noise_for(0, i, SHAPE, F16), "latent": noise_for(1, i, SHAPE, F16)})
            for i in range(start, min(start + SHARD, count))
        ]
        tar = folder / f"{number:05d}.tar"
        sha = write_shard(tar, pairs, {"seed": 0}, {})
        listed.append(ListedShard(tar, len(pairs), tar.stat().st_size, sha))
    return listed


F16 = np.dtype(np.float16)


def ours(shards: list[ListedShard], count: int) -> float:
    started = time.perf_counter()
    reader, order = PairReader(shards), ShuffledOrder(count, BATCH, 0)
    for step in range(count // BATCH):
        reader.batch(order.batch(step))
    return count / (time.perf_counter() - started)


def theirs(shards: list[ListedShard], count: int) -> float:
    started = time.perf_counter()
    data = wds.WebDataset([str(s.tar) for s in shards], shardshuffle=len(shards)).shuffle(SHARD).decode()
    seen = sum(1 for sample in data if sample["noise.npy"].size and sample["latent.npy"].size and sample["txt"])
    assert seen == count
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=4096)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        shards = make(Path(folder), count)
        rounds = [(ours(shards, count), theirs(shards, count)) for _ in range(4)][1:]
    retort, webdataset = (statistics.median(values) for values in zip(*rounds, strict=True))
    result = {
        "retort_per_second": round(retort),
        "webdataset_per_second": round(webdataset),
        "ratio": round(retort / webdataset, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
