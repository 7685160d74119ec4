"""Noise schedules: alpha and sigma at each integer timestep of a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha[t] and sigma[t], each (T,), float64, for t = 0 (almost clean) to T - 1 (almost noise).

    z_t = alpha_t x0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1.
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: object) -> NoiseSchedule:
        """From a diffusers scheduler's `alphas_cumprod` (T,), abar_t = prod_{s<=t} (1 - beta_s).

        alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t) (Ho et al. 2020, 2006.11239, eq. 4)."""
        squared = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(np.sqrt(squared), np.sqrt(1.0 - squared))

    @classmethod
    def stable_diffusion(cls) -> NoiseSchedule:
        """Stable Diffusion's schedule, `scaled_linear` in diffusers.

        T = 1000, and sqrt(beta_t) is linear in t, from sqrt(0.00085) to sqrt(0.012)."""
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        return cls.from_alphas_cumprod(np.cumprod(1.0 - betas))

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def log_snr(self) -> NDArray[np.float64]:
        """lambda_t = log(alpha_t^2 / sigma_t^2), (T,). It falls with t, to -inf where alpha_t = 0."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def at(self, t: int) -> tuple[float, float]:
        """Return (alpha, sigma) at timestep t, as floats. t = -1 means clean data, (1, 0)."""
        if t == -1:
            return 1.0, 0.0
        return float(self.alpha[t]), float(self.sigma[t])
