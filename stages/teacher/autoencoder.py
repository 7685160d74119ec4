"""Trains the teacher's VAE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.data.images.labelled import LabelledImages
from stages.training import Batch, Player, TrainingSettings, Turn

BATCH = 256
KL_WEIGHT = 1e-6
"""Weight of the KL divergence. The divergence is summed over a latent, the squared error averaged over an image.

Latent diffusion (Rombach et al. 2022, 2112.10752) also uses 1e-6, but sums both terms over a sample. In its convention,
this weight would be 1e-6 times the number of values in an image: 7.7e-4 for 3 x 16 x 16.
"""


class AutoencoderTraining:
    """L = mean (x - D(z))^2 + KL_WEIGHT * KL(q(z|x) | N(0, I)), z ~ q(z|x).

    The mean is over batch, channels and pixels. KL is summed over a sample's latent and averaged over the batch.
    """

    def __init__(self, vae: Any, training: TrainingSettings) -> None:
        self.vae = vae
        self.players = {"vae": Player(vae, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("vae", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: images (B, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(batch["images"]).latent_dist
        mse = (self.vae.decode(posterior.sample()).sample - batch["images"]).square().mean()
        return mse + KL_WEIGHT * posterior.kl().mean(), {"mse": mse}

    def after_step(self, step: int) -> None:
        pass


@torch.no_grad()
def latents_of(vae: Any, images: LabelledImages) -> Tensor:
    """Return the posterior means (N, C, h, w), not scaled."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in _batches(images)])


@torch.no_grad()
def reconstruction_mse(vae: Any, images: LabelledImages) -> float:
    """Return the mean squared error of reconstructions from the posterior's mean, over pixels in [-1, 1]."""
    errors = [(vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().sum() for x in _batches(images)]
    return float(torch.stack(errors).sum() / images.images.size)


def _batches(images: LabelledImages) -> Iterator[Tensor]:
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images.pixels(slice(start, start + BATCH)))
