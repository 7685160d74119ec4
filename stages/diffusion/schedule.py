"""The noise schedule: alpha and sigma at each of a teacher's integer timesteps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha[t]` and `sigma[t]`, float64, for t = 0 (nearly clean) to T - 1 (nearly noise)."""

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: object) -> NoiseSchedule:
        """From the table that every diffusers scheduler carries: the product of (1 - beta), length T."""
        squared = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(np.sqrt(squared), np.sqrt(1.0 - squared))

    @classmethod
    def stable_diffusion(cls) -> NoiseSchedule:
        """Stable Diffusion's own: T = 1000, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012)."""
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        return cls.from_alphas_cumprod(np.cumprod(1.0 - betas))

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def log_snr(self) -> NDArray[np.float64]:
        """(T,), falling with t."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def at(self, t: int) -> tuple[float, float]:
        """(alpha, sigma) at timestep t as floats; t = -1 is clean data, (1, 0)."""
        if t == -1:
            return 1.0, 0.0
        return float(self.alpha[t]), float(self.sigma[t])
