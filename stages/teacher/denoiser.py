"""Trains the teacher's U-Net and text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.diffusion.prediction import Prediction, target
from stages.diffusion.schedule import Level, NoiseSchedule
from stages.networks.stable_diffusion import StableDiffusion, encode
from stages.training import Batch, Player, TrainingSettings, Turn


class DenoiserTraining:
    """Trains U-Net and text encoder jointly with the denoising loss (Ho et al. 2020, 2006.11239, eq. 14).

    The target is that of the chosen `prediction`. With probability `drop_text` a prompt is replaced by the empty one,
    for classifier-free guidance (Ho and Salimans 2022, 2207.12598).
    """

    def __init__(
        self,
        denoiser: nn.ModuleDict,
        tokenizer: object,
        schedule: NoiseSchedule,
        prediction: Prediction,
        drop_text: float,
        training: TrainingSettings,
    ) -> None:
        self.denoiser, self.tokenizer, self.prediction, self.drop_text = denoiser, tokenizer, prediction, drop_text
        self.alpha = torch.from_numpy(schedule.alpha).float()
        self.sigma = torch.from_numpy(schedule.sigma).float()
        self.players = {"denoiser": Player(denoiser, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("denoiser", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latents (B, C, H, W), scaled; captions, B strings."""
        x0 = batch["latents"]
        dropped = torch.rand(len(x0)) < self.drop_text
        texts = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["captions"], strict=True)]
        t = torch.randint(len(self.alpha), (len(x0),))
        alpha, sigma = (table[t].view(-1, 1, 1, 1).to(x0.device) for table in (self.alpha, self.sigma))
        noise = torch.randn_like(x0)
        condition = StableDiffusion.conditioned_on(encode(self.tokenizer, self.denoiser["text_encoder"], texts)[0])
        level = Level(alpha, sigma, t.to(x0.device))
        output = StableDiffusion.predict(self.denoiser["unet"], alpha * x0 + sigma * noise, level, condition)
        return (output - target(self.prediction, x0, noise, alpha, sigma)).square().mean(), {}

    def after_step(self, step: int) -> None:
        pass
