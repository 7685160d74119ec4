"""Times `retort stats` on the receipts of a million pairs, and `retort stats --deep` against sha256sum.

    python -m tests.benchmarks.stats [--pairs 1000000] [--deep-gigabytes 2]

The receipts are synthetic: they have real rows and facts of small arrays for a million pairs, in shards of 1,000,
beside sparse tars of the recorded size. Seconds and peak memory are those of the whole command. For `--deep`, real
shards are written. Both commands read the same cached files in turn, three times, and the medians count. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stages.data.noise import noise_for
from stages.data.receipts import write_receipt
from stages.data.records import Pair, ShardFacts
from stages.data.shards import array_facts, prompt_facts, write_shard

SHARD = 1000
TAR_BYTES = 70_000_000
STATS = [sys.executable, "-m", "pipeline.cli", "stats"]


def receipts(folder: Path, pairs: int) -> None:
    shape = (4, 2, 2)
    for number in range(pairs // SHARD):
        indices = range(number * SHARD, (number + 1) * SHARD)
        noise = np.random.default_rng(number).standard_normal((SHARD, *shape)).astype(np.float16)
        made = [
            Pair(i, f"a synthetic prompt, number {i % 777_777}", {"noise": n, "latent": n})
            for i, n in zip(indices, noise, strict=True)
        ]
        facts = ShardFacts(
            count=SHARD,
            bytes=TAR_BYTES,
            sha256="0" * 64,
            arrays={name: array_facts(noise) for name in ("noise", "latent")},
            prompts=prompt_facts([pair.prompt for pair in made]),
            provenance={"sampler": {"name": "ddim", "steps": 50}, "seconds": 1.0},
        )
        offsets = {name: [1024 * row for row in range(SHARD)] for name in facts.arrays}
        write_receipt(folder / f"{number:05d}.parquet", made, offsets, facts)
        with open(folder / f"{number:05d}.tar", "wb") as tar:
            tar.truncate(TAR_BYTES)


def timed(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=Path.cwd(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def deep(folder: Path, gigabytes: float) -> dict[str, float]:
    shape, size = (4, 64, 64), 256
    shards = max(2, round(gigabytes * 1e9 / (size * 70_000)))
    for number in range(shards):
        pairs = [
            Pair(i, f"prompt {i}", {name: noise_for(k, i, shape, np.dtype("f2")) for k, name in enumerate(NAMES)})
            for i in range(number * size, (number + 1) * size)
        ]
        write_shard(folder / f"{number:05d}.tar", pairs, {}, {})
    tars = sorted(map(str, folder.glob("*.tar")))
    total = sum(os.path.getsize(tar) for tar in tars)
    rounds = [(timed(["sha256sum", *tars], folder), timed([*STATS, str(folder), "--deep"], folder)) for _ in range(4)]
    sha256sum, stats = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
    return {
        "sha256sum_megabytes_per_second": round(total / sha256sum / 1e6),
        "deep_megabytes_per_second": round(total / stats / 1e6),
        "ratio": round(sha256sum / stats, 2),
    }


NAMES = ("noise", "latent")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--deep-gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        receipts(Path(folder), arguments.pairs)
        seconds = statistics.median(timed([*STATS, folder], Path(folder)) for _ in range(3))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        hashing = deep(Path(folder), arguments.deep_gigabytes)
    result = {"pairs": arguments.pairs, "seconds": round(seconds, 2), "peak_gigabytes": round(peak / 1e9, 2)}
    print(json.dumps({**result, "deep": hashing}))


if __name__ == "__main__":
    main()
