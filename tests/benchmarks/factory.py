"""Factory efficiency: seconds spent inside the U-Net over wall seconds, in steady state, with one worker.

    python -m tests.benchmarks.factory ARTIFACT [--engine ray|inline] [--shards 12]

ARTIFACT is a sealed `pairs` artifact, such as the main job's; its teacher, sampler and batches are used. The
U-Net's own calls are timed by hooks while the factory runs, so that both numbers are of the same seconds;
the wall clock is the driver's, from the second finished shard to the last. For a CPU. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from pipeline.cluster import RayEngine
from pipeline.engine import InlineEngine, WorkerShape
from pipeline.store import load_artifact
from stages.data.pool import plan_shards
from stages.factory import ShardWorker


class TimedWorker:
    """A ShardWorker that says how long it has been inside the U-Net so far."""

    def __init__(self, **settings):
        self.worker = ShardWorker(**settings)
        self.inside = self.entered = 0.0
        self.worker.teacher.unet.register_forward_pre_hook(self._enter)
        self.worker.teacher.unet.register_forward_hook(self._leave)

    def __call__(self, plan):
        self.worker(plan)
        return self.inside

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
        make = partial(
            TimedWorker,
            teacher_artifact=pairs.inputs["teacher"],
            prompts_source=config.prompts,
            prompts_identity=pairs.record["identity"]["contents"]["prompts"],
            sampler=config.sampler,
            dtype=config.dtype,
            storage_dtype=config.storage_dtype,
            execution=config.execution,
            pool=Path(pool),
            seed=0,
            threads=os.cpu_count() or 1,
        )
        plans = plan_shards(arguments.shards * config.shard_size, config.shard_size)
        seen = [(time.perf_counter(), inside) for _, inside in engine.map("timed", make, plans, WorkerShape(1, 0.0))]
    engine.close()
    (start, inside_at_start), (end, inside_at_end) = seen[1], seen[-1]
    result = {
        "engine": arguments.engine,
        "pairs_per_second": round((len(seen) - 2) * config.shard_size / (end - start), 1),
        "efficiency": round((inside_at_end - inside_at_start) / (end - start), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
