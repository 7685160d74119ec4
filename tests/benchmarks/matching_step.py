"""Compares the time of a training step of DMD or DMD2 with that of the passes of its networks alone.

    python -m tests.benchmarks.matching_step dmd2 [--batch 32] [--threads 1] [--rounds 5] [--guidance-scale 1.0]

Uses the shipped digit_scenes teacher, random latents, a one-step student, and new weights of all networks. Runs in
turn: ten steps of the training loop (both players, noising, the two scores, clipping, AdamW, EMA, logging); and ten
times the bare passes that these steps need, forward and backward. For DMD, the student makes samples and the outputs of
as many pairs. DMD2 has its GAN head, and the student has two turns in ten steps. A guided teacher is called on twice
the batch. Prints the seconds per step of both and their ratio, as medians over the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stages.methods.base import Materials, StudentTraining
from stages.methods.dmd.config import DMDConfig
from stages.methods.dmd.method import DMD
from stages.methods.dmd2.config import DMD2Config
from stages.methods.dmd2.method import DMD2
from stages.networks.fake_score import FakeScore
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.unet_features import Bottleneck
from tests.benchmarks.side_by_side import SHIPPED, STEPS, compare

METHODS = {"dmd": DMDConfig, "dmd2": DMD2Config}


def output(network: Any, z: Tensor, c: Tensor, copies: int = 1) -> Tensor:
    """Return the network's output on `copies` copies of the batch."""
    t = torch.full((len(z) * copies,), 999.0)
    made: Tensor = network(torch.cat([z] * copies), t, torch.cat([c] * copies)).sample
    return made


def judged(fake: FakeScore, z: Tensor, c: Tensor) -> Tensor:
    """Return the sum of the logits of the GAN's head."""
    judgement: Tensor = fake.head(Bottleneck(fake.network).features(lambda: output(fake.network, z, c))).sum()
    return judgement


def scores(teacher: StableDiffusion, fake: FakeScore, z: Tensor, c: Tensor, guided: bool) -> None:
    with torch.no_grad():
        output(teacher.network, z, c, 2 if guided else 1)
        output(fake.network, z, c)


def bare(
    method: DMD | DMD2, teacher: StableDiffusion, batch: Mapping[str, Any], guided: bool, student_turn: bool
) -> None:
    z, c = batch["latent"], teacher.text_states(batch["prompts"])
    judges = isinstance(method, DMD2)
    student, fake = method.student.network.requires_grad_(True), method.fake.requires_grad_(False)
    if student_turn:
        made = output(student, z, c, 1 if judges else 2)
        scores(teacher, fake, z, c, guided)
        if judges:
            judged(fake, z.detach().requires_grad_(), c).backward()
        made.sum().backward()
        student.zero_grad()
    else:
        with torch.no_grad():
            output(student, z, c)
    fake.requires_grad_(True)
    loss = output(fake.network, z, c).sum()
    if judges:
        loss = loss + judged(fake, z, c) + judged(fake, z, c)
    loss.backward()
    fake.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    teacher = StableDiffusion(SHIPPED)
    settings = StudentTraining(
        steps=STEPS * (given.rounds + 1),
        batch_size=given.batch,
        learning_rate=1e-6,  # regression on random pairs would collapse the student, and end the loop
    )
    method = METHODS[given.method](guidance_scale=given.guidance_scale).create(Materials(teacher, settings))
    assert isinstance(method, DMD | DMD2)
    prompts = [f"a {colour} handwritten seven" for colour in ("red", "blue")]
    shape = (given.batch, *teacher.latent_shape)
    batch = {
        "noise": torch.randn(shape),
        "latent": torch.randn(shape),
        "prompts": [prompts[i % 2] for i in range(given.batch)],
    }
    guided = given.guidance_scale > 1
    stream, every = ("pairs", 1) if isinstance(method, DMD) else ("latents", method.config.fake_updates)

    def passes(step: int) -> None:
        bare(method, teacher, batch, guided, student_turn=step % every == 0)

    compare(method, {stream: batch}, passes, given.rounds)


if __name__ == "__main__":
    main()
