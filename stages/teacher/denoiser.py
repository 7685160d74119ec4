"""Training of the teacher's U-Net and text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.diffusion.prediction import Prediction, target
from stages.diffusion.schedule import NoiseSchedule
from stages.networks.latent import encode
from stages.training import Batch, Player, TrainingSettings, Turn


class DenoiserTraining:
    """Denoising with text, jointly training the text encoder (Ho et al. 2020, 2006.11239, eq. 14, in
    the chosen prediction); with probability `drop_text` the prompt is empty (Ho and Salimans 2022)."""

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
        """`batch`: latents (B, C, H, W), scaled; captions (B strings)."""
        x0 = batch["latents"]
        dropped = torch.rand(len(x0)) < self.drop_text
        texts = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["captions"], strict=True)]
        t = torch.randint(len(self.alpha), (len(x0),))
        alpha, sigma = (table[t].view(-1, 1, 1, 1).to(x0.device) for table in (self.alpha, self.sigma))
        noise = torch.randn_like(x0)
        condition = encode(self.tokenizer, self.denoiser["text_encoder"], texts)
        output = self.denoiser["unet"](alpha * x0 + sigma * noise, t.to(x0.device), condition).sample
        return (output - target(self.prediction, x0, noise, alpha, sigma)).square().mean(), {}

    def after_step(self, step: int) -> None:
        pass
