"""Compares the time of a training step of Diffusion2GAN with that of the passes of its networks alone.

    python -m tests.benchmarks.gan_step [--batch 32] [--threads 1] [--rounds 5]

Uses the shipped digit_scenes teacher, a perceptual network of width 16 with random weights, and random latents. Runs in
turn: ten steps of the training loop (both players, E-LatentLPIPS, mix-and-match, one R1 penalty, clipping, AdamW, EMA,
logging); and ten times the bare passes that these steps need, forward and backward: student; perceptual network on
output and target; discriminator on the student's output, then on twice the batch; one R1. Prints the seconds per step
of both and their ratio, as medians over the rounds.
"""

from __future__ import annotations

import argparse

import torch

from stages.losses.adversarial import r1_penalty
from stages.losses.augmentation import Augmentation
from stages.losses.config import Regression
from stages.losses.perceptual import PerceptualLoss
from stages.methods.base import Materials, StudentTraining
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.diffusion2gan.method import Diffusion2GAN
from stages.networks.condition import Condition
from stages.networks.perceptual import LPIPS, About
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.vgg import VGG
from tests.benchmarks.side_by_side import SHIPPED, STEPS, compare


def bare(method: Diffusion2GAN, batch: dict, penalised: bool) -> None:
    z, x, c = batch["noise"], batch["latent"], method.student.encode(batch["prompts"])
    student, d, f = method.student.requires_grad_(True), method.discriminator, method.distance.metric
    made = student(z, c)
    with torch.no_grad():
        f.features(x)
    seen = sum(taps.sum() for taps in f.features(made))
    d.requires_grad_(False)
    (seen + sum(m.sum() for m in d(made, z, c))).backward()
    d.requires_grad_(True)
    judged = sum(m.sum() for m in d(torch.cat([x, made.detach()]), torch.cat([z, z]), Condition.cat([c, c])))
    if penalised:
        judged = judged + r1_penalty(lambda real: d(real, z[:1], c.select(slice(1))), x[:1], 1.0)
    judged.backward()
    for module in (student, d):
        module.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    teacher = StableDiffusion(SHIPPED)
    settings = StudentTraining(steps=STEPS * (given.rounds + 1), batch_size=given.batch)
    config = Diffusion2GANConfig(loss=Regression(name="mse"), discriminator={"r1_every": STEPS})
    method = config.create(Materials(teacher, settings))
    assert isinstance(method, Diffusion2GAN)
    channels = teacher.latent_shape[0]
    vgg = VGG(channels, 16, "latents")
    heads = [torch.ones(n) for n in vgg.tap_channels]
    metric = LPIPS(vgg, heads, About("latents", channels, 16, "random")).requires_grad_(False)
    method.distance = PerceptualLoss(metric, Augmentation("bg"))
    prompts = [f"a {colour} handwritten seven" for colour in ("red", "blue")]
    shape = (given.batch, *teacher.latent_shape)
    batch = {
        "noise": torch.randn(shape),
        "latent": torch.randn(shape),
        "prompts": [prompts[i % 2] for i in range(given.batch)],
    }
    compare(method, {"pairs": batch}, lambda step: bare(method, batch, penalised=step == 0), given.rounds)


if __name__ == "__main__":
    main()
