"""Noise schedules: alpha and sigma at each integer timestep of a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Level:
    """A noise level: z = alpha x0 + sigma noise. It unpacks into (alpha, sigma).

    Its fields are numbers, or tensors with one value for each of B samples. alpha and sigma are then (B, 1, 1, 1), and
    the timestep is (B,)."""

    alpha: Any
    sigma: Any
    timestep: Any
    """The position in the noise schedule, from -1 (clean data) to T - 1. It may be fractional."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.alpha, self.sigma))


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha[t] and sigma[t], each (T,), float64, for t = 0 (almost clean) to T - 1 (almost noise).

    z_t = alpha_t x0 + sigma_t noise. alpha_t / sigma_t must fall with t. The schedule need not be variance preserving.
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: object) -> NoiseSchedule:
        """Return the schedule of a diffusers scheduler's `alphas_cumprod` (T,), abar_t = prod_{s<=t} (1 - beta_s).

        alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t) (Ho et al. 2020, 2006.11239, eq. 4)."""
        squared = np.asarray(alphas_cumprod, dtype=np.float64)
        return cls(np.sqrt(squared), np.sqrt(1.0 - squared))

    @classmethod
    def stable_diffusion(cls) -> NoiseSchedule:
        """Return Stable Diffusion's schedule, `scaled_linear` in diffusers.

        T = 1000, and sqrt(beta_t) is linear in t, from sqrt(0.00085) to sqrt(0.012)."""
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
        return cls.from_alphas_cumprod(np.cumprod(1.0 - betas))

    @classmethod
    def flow(cls, timesteps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
        """Return the schedule of flow matching, alpha = 1 - s and sigma = s, with T = `timesteps`.

        s = shift r / (1 + (shift - 1) r) with r = (t + 1) / T (Esser et al. 2024, 2403.03206, eq. 23). The schedule
        ends in pure noise. A `shift` above 1 makes all levels before the last noisier."""
        r = np.arange(1, timesteps + 1, dtype=np.float64) / timesteps
        s = shift * r / (1 + (shift - 1) * r)
        return cls(1 - s, s)

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def log_snr(self) -> NDArray[np.float64]:
        """lambda_t = log(alpha_t^2 / sigma_t^2), (T,). It falls with t, and is -inf where alpha_t = 0."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def at(self, t: int) -> Level:
        """Return the level at timestep t, as numbers. t = -1 is clean data, with alpha = 1 and sigma = 0."""
        return Level(1.0, 0.0, -1) if t == -1 else Level(float(self.alpha[t]), float(self.sigma[t]), t)
