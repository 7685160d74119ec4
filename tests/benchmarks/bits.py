"""Hashes the results of small pipelines of every method. Equal hashes show that a refactoring changed no byte.

    python -m tests.benchmarks.bits STORE > before.txt

Runs each manifest of PIPELINES inline, on one thread, in STORE. Prints the sha256 of each result: shards, latents,
weights and figures. Files that hold dates, seconds or versions are left out. Compare commits on one machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from stages.data.files import sha256_of
from tests.support.pipelines import GAUSSIAN, TINY, execute

TEACHER = TINY[: TINY.index("  student:")].replace("count: 96", "count: 64")
LATENTS = "  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}\n"
STUDENT = """  student:
    kind: distill
    %s
    method: %s
    training: {steps: 4, batch_size: 8}
    held_out: 16
    execution: {threads: 1}
"""
QUALITY = """  quality:
    kind: evaluate
    student: student
    pairs: pairs
    samples: 20
    split: validation
    execution: {threads: 1, micro_batch: 10}
"""
EPSILON = ("denoiser: {channels: [16, 32]", "prediction: epsilon\n      denoiser: {channels: [16, 32]")


def student(data: str, method: str) -> str:
    return TEACHER + (LATENTS if data.startswith("latents") else "") + STUDENT % (data, method) + QUALITY


PIPELINES = {
    "gaussian": GAUSSIAN,
    "gaussian, dpmpp_2m": GAUSSIAN.replace("steps: 10", "steps: 10, name: dpmpp_2m"),
    "gaussian, heun": GAUSSIAN.replace("steps: 10", "steps: 10, name: heun"),
    "knowledge_distillation": student("pairs: pairs", "knowledge_distillation"),
    "knowledge_distillation, epsilon": student("pairs: pairs", "knowledge_distillation").replace(*EPSILON),
    "diffusion2gan": student("pairs: pairs", "{name: diffusion2gan, loss: mse, discriminator: {r1_every: 2}}"),
    "progressive": student(
        "latents: latents", "{name: progressive, start_steps: 4, end_steps: 1, guidance_scale: 2.0}"
    ),
    "progressive, cosine, both": student(
        "latents: latents",
        "{name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 2.0, schedule: cosine, prediction: both}",
    ),
    "progressive, epsilon": student(
        "latents: latents",
        "{name: progressive, start_steps: 4, end_steps: 2, guidance_scale: 2.0, match_first: true}",
    ).replace(*EPSILON),
    "guided": student("latents: latents", "{name: guided, start_steps: 4, end_steps: 2, w_range: [0.0, 4.0]}"),
    "guided, stochastic": student(
        "latents: latents",
        "{name: guided, start_steps: 4, end_steps: 2, w_range: [0.0, 4.0], sampler: stochastic}",
    ),
    "consistency": student("latents: latents", "{name: consistency, steps: 2, solver_steps: 8, guidance_scale: 2.0}"),
    "consistency, w": student("pairs: pairs", "{name: consistency, steps: 2, solver_steps: 8, w_range: [0.0, 4.0]}"),
}


def results(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".npy", ".tar") or file.name in ("metrics.json", "scheduler_config.json"):
            yield file


def digest(file: Path) -> str:
    if file.name != "metrics.json":
        return sha256_of(file)
    metrics = json.loads(file.read_text(encoding="utf-8"))
    figures = {
        side: {name: value for name, value in values.items() if name != "seconds_per_image"}
        for side, values in metrics["sides"].items()
    }
    import hashlib

    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    torch.set_num_threads(1)
    for name, text in PIPELINES.items():
        for stage in execute(text, store).values():
            for folder in (stage.artifact.folder, stage.pool):
                for file in results(folder) if folder and folder.exists() else ():
                    print(f"{name} | {stage.name} | {file.relative_to(folder)} | {digest(file)[:16]}", flush=True)


if __name__ == "__main__":
    main()
