"""Factory efficiency: seconds inside the U-Net, and seconds spent writing shards, over wall seconds, in steady state,
with one worker.

    python -m tests.benchmarks.factory ARTIFACT [--engine ray|inline] [--shards 12]

ARTIFACT is a sealed `pairs` artifact, such as the main job's; its teacher, sampler and batches are used. The
U-Net's own calls are timed by hooks while the factory runs, so that both numbers are of the same seconds;
the wall clock is the driver's, from the second finished shard to the last. For a CPU. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import stages.pairs.factory
from pipeline.engines import InlineEngine, WorkerShape
from pipeline.engines.ray import RayEngine
from pipeline.store import load_artifact
from stages.data.pool import PROMPTS, plan_shards, pool_of
from stages.data.shards import write_shard
from stages.pairs.factory import ShardWorker


class TimedWorker:
    """A ShardWorker that says how long it has been inside the U-Net, and writing, so far."""

    def __init__(self, **settings):
        self.worker = ShardWorker(**settings)
        self.inside = self.entered = self.writing = 0.0
        stages.pairs.factory.write_shard = self._write
        self.worker.teacher.network.register_forward_pre_hook(self._enter)
        self.worker.teacher.network.register_forward_hook(self._leave)

    def __call__(self, plan):
        self.worker(plan)
        return self.inside, self.writing

    def _write(self, *arguments):
        started = time.perf_counter()
        sha256 = write_shard(*arguments)
        self.writing += time.perf_counter() - started
        return sha256

    def _enter(self, *_):
        self.entered = time.perf_counter()

    def _leave(self, *_):
        self.inside += time.perf_counter() - self.entered


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    parser.add_argument("--shards", type=int, default=12)
    arguments = parser.parse_args()
    pairs = load_artifact(arguments.artifact)
    config = pairs.stage
    engine = RayEngine() if arguments.engine == "ray" else InlineEngine()
    with tempfile.TemporaryDirectory() as pool:
        shutil.copy(pool_of(pairs.folder) / PROMPTS, pool)
        make = partial(
            TimedWorker,
            teacher_artifact=pairs.inputs["teacher"],
            teacher_sha256=pairs.inputs["teacher"].sha256,
            prompts_identity="the artifact's",
            sampler=config.sampler,
            path_timesteps=config.path_timesteps,
            text_embeddings=config.text_embeddings,
            dtype=config.dtype,
            storage_dtype=config.storage_dtype,
            execution=config.execution,
            pool=Path(pool),
            seed=0,
            threads=os.cpu_count() or 1,
        )
        plans = plan_shards(arguments.shards * config.shard_size, config.shard_size)
        seen = [(time.perf_counter(), *spent) for _, spent in engine.map("timed", make, plans, WorkerShape(1, 0.0))]
    engine.close()
    (start, inside_at_start, writing_at_start), (end, inside_at_end, writing_at_end) = seen[1], seen[-1]
    result = {
        "engine": arguments.engine,
        "pairs_per_second": round((len(seen) - 2) * config.shard_size / (end - start), 1),
        "efficiency": round((inside_at_end - inside_at_start) / (end - start), 3),
        "writing": round((writing_at_end - writing_at_start) / (end - start), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
