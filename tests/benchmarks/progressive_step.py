"""Compares the time of a training step of progressive distillation with that of the passes of its networks alone.

    python -m tests.benchmarks.progressive_step [--batch 32] [--threads 1] [--rounds 5] [--guidance-scale 1.0]

Uses the shipped digit_scenes teacher, random latents, and a round from 8 steps to 4. Runs in turn: ten steps of the
training loop (noising, the target, the weighted loss, clipping, AdamW, logging); and ten times the bare passes that
these steps need: two calls of the teacher (on twice the batch if it is guided), and one forward and backward pass of
the student. Prints the seconds per step of both and their ratio, as medians over the rounds."""

from __future__ import annotations

import argparse

import torch

from stages.methods.base import Materials, StudentTraining
from stages.methods.progressive.config import ProgressiveConfig
from stages.methods.progressive.method import Progressive
from stages.networks.stable_diffusion import StableDiffusion
from tests.benchmarks.side_by_side import SHIPPED, STEPS, compare


def bare(method: Progressive, teacher: StableDiffusion, batch: dict, guided: bool) -> None:
    z, c = batch["latent"], teacher.text_states(batch["prompts"])
    t = torch.full((len(z),), 999.0)
    with torch.no_grad():
        for _ in range(2):
            teacher.network(*(torch.cat([v, v]) if guided else v for v in (z, t, c)))
    network = method.student.network.requires_grad_(True)
    network(z, t, c).sample.sum().backward()
    network.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    teacher = StableDiffusion(SHIPPED)
    settings = StudentTraining(steps=STEPS * (given.rounds + 1), batch_size=given.batch, ema_decay=0.0)
    config = ProgressiveConfig(start_steps=8, end_steps=4, guidance_scale=given.guidance_scale)
    method = config.create(Materials(teacher, settings))
    assert isinstance(method, Progressive)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    batch = {
        "latent": torch.randn(given.batch, *teacher.latent_shape),
        "prompts": [f"a red {words[i % 10]} above a blue {words[i // 10 % 10]}" for i in range(given.batch)],
    }
    guided = given.guidance_scale > 1
    compare(method, {"latents": batch}, lambda _: bare(method, teacher, batch, guided), given.rounds)


if __name__ == "__main__":
    main()
