"""Trains a teacher's network, and a new text encoder with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stages.diffusion.prediction import Prediction, target
from stages.diffusion.schedule import Level, NoiseSchedule
from stages.networks.condition import Condition
from stages.training import Batch, Player, TrainingSettings, Turn


class DenoiserTraining:
    """Trains `networks` with the denoising loss (Ho et al. 2020, 2006.11239, eq. 14).

    `condition` encodes prompts, and `predict(z, level, condition)` calls the network. The target is that of the chosen
    `prediction`. With probability `drop_text` a prompt is replaced by the empty one, for classifier-free guidance (Ho
    and Salimans 2022, 2207.12598).

    `times` are the first timestep and the end, which is not included; by default all timesteps. `crop` is the side of
    crops of the latents. Each batch is cropped at one random place. PanGu-Draw trains its texture network on smaller
    images, but does not say how it makes them (2312.16486, section 3.1): crops keep the scale of textures.
    """

    def __init__(
        self,
        networks: nn.Module,
        condition: Callable[[Sequence[str]], Condition],
        predict: Callable[[Tensor, Level, Condition], Tensor],
        schedule: NoiseSchedule,
        prediction: Prediction,
        drop_text: float,
        training: TrainingSettings,
        times: tuple[int, int] | None = None,
        crop: int | None = None,
    ) -> None:
        self.condition, self.predict, self.prediction, self.drop_text = condition, predict, prediction, drop_text
        self.alpha = torch.from_numpy(schedule.alpha).float()
        self.sigma = torch.from_numpy(schedule.sigma).float()
        self.first, self.end = times or (0, len(schedule))
        self.crop = crop
        self.players = {"denoiser": Player(networks, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("denoiser", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latents (B, C, H, W), scaled; captions, B strings."""
        x0 = batch["latents"]
        if self.crop:
            row, column = (int(torch.randint(side - self.crop + 1, ())) for side in x0.shape[2:])
            x0 = x0[:, :, row : row + self.crop, column : column + self.crop]
        dropped = torch.rand(len(x0)) < self.drop_text
        texts = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["captions"], strict=True)]
        t = torch.randint(self.first, self.end, (len(x0),))
        alpha, sigma = (table[t].view(-1, 1, 1, 1).to(x0.device) for table in (self.alpha, self.sigma))
        noise = torch.randn_like(x0)
        output = self.predict(alpha * x0 + sigma * noise, Level(alpha, sigma, t.to(x0.device)), self.condition(texts))
        return (output - target(self.prediction, x0, noise, alpha, sigma)).square().mean(), {}

    def after_step(self, step: int) -> None:
        pass
