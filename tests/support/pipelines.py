"""Small pipelines of real components, and how a test runs or plans them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.commands.console import held
from pipeline.engines import Engine, InlineEngine
from pipeline.manifest import loads
from pipeline.planning import PlannedStage, Selection, make_plan, read_contents
from pipeline.runs import Reporter, Run, Runner
from pipeline.store import Store

GAUSSIAN = """
name: gaussian
stages:
  teacher: {kind: teacher, gaussian: {mean: 0.5, std: 0.6, shape: [2, 4, 4], delay: 0.0}}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: digits
    count: 40
    shard_size: 16
    sampler: {steps: 10}
    execution: {micro_batch: 8}
"""
SLOW = GAUSSIAN.replace("delay: 0.0", "delay: 0.06")
"""Its 40 pairs take 3 seconds, and its first shard 1.2 seconds."""
LONG = SLOW.replace("count: 40", "count: 400")
"""For tests that interrupt a run. After its first shard, at least 29 seconds of work remain."""

TINY = """
name: tiny
stages:
  teacher:
    kind: teacher
    train:
      dataset: digits
      vae: {channels: [8, 16], max_mse: 1.0, training: {steps: 40, batch_size: 32, learning_rate: 4e-3}}
      denoiser: {channels: [16, 32], training: {steps: 30, batch_size: 16}}
    execution: {threads: 1}
  pairs:
    kind: pairs
    teacher: teacher
    prompts: digits
    count: 96
    shard_size: 32
    sampler: {steps: 5, guidance_scale: 2.0}
    execution: {micro_batch: 16, threads: 1}
  student:
    kind: distill
    pairs: pairs
    method: {name: knowledge_distillation}
    training: {steps: 24, batch_size: 16}
    held_out: 32
    execution: {threads: 1, checkpoint_every: 7}
"""
PROGRESSIVE = """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  fewer:
    kind: distill
    latents: latents
    method: {name: progressive, start_steps: 8, end_steps: 1, guidance_scale: 2.0, training_steps: {1: 6}}
    training: {steps: 4, batch_size: 16, learning_rate: 1e-4, ema_decay: 0.0}
    execution: {threads: 1}
  quality:
    kind: evaluate
    student: fewer
    pairs: pairs
    samples: 20
    teacher_steps: [2]
    execution: {threads: 1}
"""
"""Follows TINY: progressive distillation from 8 steps to 1, and an evaluation of every link."""


PARTS = """
  parted:
    kind: evaluate
    student: student
    real: probe
    samples: 100
    teacher_steps: [2]
    execution: {threads: 1} # two workers on two cores have one thread each
"""
"""An evaluation for TINY with a probe, whose parts several workers can measure."""


def execute(
    text: str,
    store: Path,
    overrides: Sequence[str] = (),
    engine: Engine | None = None,
    only: Sequence[str] = (),
    name: str | None = None,
    force: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> dict[str, PlannedStage]:
    """Submit a manifest's text as `retort submit` does, in this process; return the plan by stage."""
    loaded = loads(text, "test.yaml", [*overrides, f"store={store}"])
    run = Run(Store(store), name or loaded.manifest.name)
    with held(loaded, run, Selection(only, force=force), wait=False) as (plan, chosen):
        Runner(run, loaded.manifest, engine or InlineEngine(), reporter or Reporter()).execute(plan, chosen)
    return {stage.name: stage for stage in plan}


def plan_of(text: str, store: Path, overrides: Sequence[str] = (), name: str | None = None) -> dict[str, PlannedStage]:
    loaded = loads(text, "test.yaml", [*overrides, f"store={store}"])
    found = Store(store)
    run = Run(found, name or loaded.manifest.name)
    plan = make_plan(loaded, read_contents(loaded, store / "contents.json"), found, run.plan())
    return {stage.name: stage for stage in plan}


def without_seconds(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return all figures of an evaluation that are the same in an equal run."""
    return {
        side: {name: value for name, value in values.items() if name != "seconds_per_image"}
        for side, values in {**metrics["sides"], **metrics["references"]}.items()
    }


def flip(path: Path, place: int) -> None:
    """Flip a bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
