"""The noise levels of a schedule at random timesteps of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.diffusion.schedule import Level, NoiseSchedule


class Levels:
    """The tables of a noise schedule on a device. x and noise are (B, C, H, W), t (B,) are timesteps 0 to T - 1."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str) -> None:
        self.alpha = torch.from_numpy(schedule.alpha).to(device)
        self.sigma = torch.from_numpy(schedule.sigma).to(device)

    def at(self, t: Tensor) -> Level:
        """Return the levels at timesteps t. alpha and sigma are (B, 1, 1, 1), float64."""
        return Level(self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1), t)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return z = alpha x + sigma noise, in the dtype of x."""
        alpha, sigma = self.at(t)
        return (alpha * x + sigma * noise).to(x.dtype)

    def draw(self, x: Tensor, time_range: tuple[float, float] = (0.0, 1.0)) -> tuple[Tensor, Tensor]:
        """Draw timesteps (B,) uniformly between two fractions of T, both included, and noise shaped as x."""
        count = len(self.alpha)
        least, most = (min(round(part * count), count - 1) for part in time_range)
        return torch.randint(least, most + 1, (len(x),)).to(x.device), torch.randn_like(x)
