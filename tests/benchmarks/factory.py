"""Measures the efficiency of the pair factory with one worker: the seconds inside the U-Net, and the seconds spent on
writing shards, each divided by wall seconds.

    python -m tests.benchmarks.factory ARTIFACT [--engine ray|inline|compiled|diffusers] [--shards 12]
    python -m tests.benchmarks.factory ARTIFACT --rounds 5 [--shards 6]

ARTIFACT is a sealed `pairs` artifact, such as the main job's. Its teacher, sampler and batches are used. Hooks time the
calls of the U-Net while the factory runs, so both numbers cover the same seconds. Wall seconds are those of the driver,
from the second finished shard to the last. The benchmark is for CPUs. Prints JSON.

The engine `diffusers` is the loop of diffusers' own pipeline in this process, with the same teacher, batches and
sampler. It writes nothing. `compiled` is `inline` with `compile: true`, whose compilation is not timed. With --rounds,
the engines run in turn, each in its own process. Then the medians of the rates and of their ratios over the rounds are
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import stages.pairs.factory
from pipeline.engines import InlineEngine, WorkerShape
from pipeline.engines.ray import RayEngine
from pipeline.store import load_artifact
from stages.base import Artifact
from stages.data.pool import PROMPTS, plan_shards, pool_of
from stages.data.reader import PairReader
from stages.data.shards import write_shard
from stages.pairs.factory import ShardWorker


class TimedWorker:
    """A ShardWorker that returns its seconds so far inside the U-Net, and on writing."""

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


def by_diffusers(pairs: Artifact, shards: int) -> float:
    """Return the pairs per second of diffusers' pipeline, in batches as large as the factory's. The first batch is not
    timed."""
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    config = pairs.stage
    torch.set_num_threads(os.cpu_count() or 1)
    pipeline = DiffusionPipeline.from_pretrained(pairs.inputs["teacher"].folder, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    size = config.execution.micro_batch
    reader, started = PairReader.of(pairs), 0.0
    batches = shards * config.shard_size // size
    for number in range(batches):
        if number == 1:
            started = time.perf_counter()
        batch = reader.batch([(number * size + i) % len(reader) for i in range(size)])
        pipeline(
            batch.prompts,
            num_inference_steps=config.sampler.steps,
            guidance_scale=config.sampler.guidance_scale,
            latents=torch.from_numpy(batch.noise).float(),
            output_type="latent",
        )
    return (batches - 1) * size / (time.perf_counter() - started)


def in_turn(artifact: Path, rounds: int, shards: int) -> dict[str, float]:
    """Run the engines in turn, each in its own process. Return the medians of their rates, and of the ratios within a
    round."""
    rates: dict[str, list[float]] = {engine: [] for engine in ("diffusers", "inline", "compiled", "ray")}
    for _ in range(rounds):
        for engine, found in rates.items():
            command = [sys.executable, "-m", "tests.benchmarks.factory", str(artifact), "--engine", engine]
            done = subprocess.run([*command, "--shards", str(shards)], stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1])["pairs_per_second"])
            print(engine, found[-1], file=sys.stderr, flush=True)

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)

    medians = {engine: statistics.median(found) for engine, found in rates.items()}
    pairs = (("ray", "inline"), ("inline", "diffusers"), ("compiled", "inline"))
    return {**medians, **{f"{one}_of_{other}": ratio(one, other) for one, other in pairs}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", choices=["ray", "inline", "compiled", "diffusers"], default="ray")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rounds", type=int, help="how often to run all engines in turn")
    arguments = parser.parse_args()
    if arguments.rounds:
        print(json.dumps(in_turn(arguments.artifact, arguments.rounds, arguments.shards)))
        return
    pairs = load_artifact(arguments.artifact)
    if arguments.engine == "diffusers":
        rate = by_diffusers(pairs, arguments.shards)
        print(json.dumps({"engine": "diffusers", "pairs_per_second": round(rate, 1)}))
        return
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
            execution=config.execution.model_copy(update={"compile": arguments.engine == "compiled"}),
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
