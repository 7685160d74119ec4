"""Measures the R1 penalty at several latent sizes, which shows how its weight has to scale.

    python -m tests.benchmarks.r1_size [--seeds 3]

Uses the discriminator of Diffusion2GAN on a narrow U-Net of Stable Diffusion 1.5's layout, with random weights. The
layers of its new inputs, which start as zeros, get random weights too (deviation 0.1). The penalty has weight 1. The
latents are normal, in three sizes. The penalty is computed for two definitions of D(x): the sum of the logits over
positions, as in Retort, and their mean. Prints both penalties, and how the first grows from size to size.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from stages.losses.adversarial import mean_over_maps, r1_penalty
from stages.networks.discriminator import DiffusionDiscriminator
from stages.networks.stable_diffusion import StableDiffusion
from tests.support.networks import adapter_around

SIZES = (8, 16, 32)


def discriminator(size: int, seed: int) -> DiffusionDiscriminator:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    made = DiffusionDiscriminator(adapter_around(unet), unet)
    assert made.noise is not None
    for parameter in [*made.resized.parameters(), *made.noise.parameters()]:
        nn.init.normal_(parameter, std=0.1)
    return made


def penalties(size: int, seed: int) -> tuple[float, float]:
    """Return the penalties of the sum over positions, and of the mean."""
    d = discriminator(size, seed)
    x, z = torch.randn(2, 4, size, size), torch.randn(2, 4, size, size)
    c = StableDiffusion.conditioned_on(torch.randn(2, 5, 32))
    of_mean = r1_penalty(lambda real: [mean_over_maps(d(real, z, c)).view(-1, 1, 1)], x, 1.0)
    return float(r1_penalty(lambda real: d(real, z, c), x, 1.0).detach()), float(of_mean.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    before = None
    print(f"{'latents':>8}  {'sum':>9}  {'mean':>9}  growth of the sum")
    for size in SIZES:
        of_sum, of_mean = (
            sum(column) / len(seeds) for column in zip(*(penalties(size, s) for s in seeds), strict=True)
        )
        growth = "" if before is None else f"{of_sum / before:.2f}"
        print(f"{size:>4}x{size:<3}  {of_sum:9.3g}  {of_mean:9.3g}  {growth}")
        before = of_sum


if __name__ == "__main__":
    main()
