"""Factory efficiency: seconds of the bare U-Net calls of a shard over seconds a shard takes in steady state.

    python -m tests.benchmarks.factory ARTIFACT [--engine ray|inline] [--shards 12]

ARTIFACT is a sealed `pairs` artifact, such as the main job's; its teacher, sampler and batches are used,
with one worker and all cores. Bare calls and shards take turns on the same warm worker, so that the ratio
holds on a machine whose speed drifts. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from pipeline.cluster import RayEngine
from pipeline.engine import InlineEngine, WorkerShape
from pipeline.store import load_artifact
from stages.data.pool import plan_shards
from stages.factory import ShardWorker


def bare_calls(folder, shape, steps, guided, threads):
    """A generator function, as engines want it: U-Net calls alone, with the shapes of one shard's batches."""
    import torch

    from stages.networks.latent import LatentTeacher

    torch.set_num_threads(threads)
    teacher = LatentTeacher(folder)
    yield from ()
    with torch.inference_mode():
        batches = []
        for size in shape:
            condition = teacher.encode_prompts(["a red handwritten seven"] * size)
            rows = 2 * size if guided else size
            batches.append((torch.randn(rows, *teacher.latent_shape), condition.repeat(rows // size, 1, 1)))
        teacher.unet(*_call(batches[0]))
        started = time.perf_counter()
        for batch in batches:
            for _ in range(steps):
                teacher.unet(*_call(batch))
        return time.perf_counter() - started


def _call(batch):
    return batch[0], 500, batch[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pairs = load_artifact(arguments.artifact)
    config, threads = pairs.stage, os.cpu_count() or 1
    micro = config.execution.micro_batch
    sizes = [min(micro, config.shard_size - start) for start in range(0, config.shard_size, micro)]
    bare_arguments = (
        pairs.inputs["teacher"].folder, sizes, config.sampler.steps, config.sampler.guidance_scale != 1, threads,
    )  # fmt: skip
    engine = RayEngine() if arguments.engine == "ray" else InlineEngine()
    shape = WorkerShape(1, 0.0)
    bare: list[float] = []
    made: list[float] = []
    with tempfile.TemporaryDirectory() as pool:
        for round_ in range(arguments.rounds):
            for _ in range(3):
                bare.append(_finish(engine.run(bare_calls, bare_arguments, shape)))
            make = partial(
                ShardWorker,
                teacher_artifact=pairs.inputs["teacher"],
                prompts_source=config.prompts,
                prompts_identity=pairs.record["identity"]["contents"]["prompts"],
                sampler=config.sampler,
                dtype=config.dtype,
                storage_dtype=config.storage_dtype,
                execution=config.execution,
                pool=Path(pool) / str(round_),
                seed=0,
                threads=threads,
            )
            times = []
            for _ in engine.map(
                str(round_), make, plan_shards(arguments.shards * config.shard_size, config.shard_size), shape
            ):
                times.append(time.perf_counter())
            made += [b - a for a, b in itertools.pairwise(times)]  # the first two include loading
    engine.close()
    result = {
        "engine": arguments.engine,
        "bare_seconds_per_shard": round(statistics.median(bare), 4),
        "factory_seconds_per_shard": round(statistics.mean(made), 4),
        "pairs_per_second": round(config.shard_size / statistics.mean(made), 1),
        "efficiency": round(statistics.median(bare) / statistics.mean(made), 3),
    }
    print(json.dumps(result))


def _finish(steps) -> float:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


if __name__ == "__main__":
    main()
