"""How students of few steps go from noise to data. Their state is float64, of which the network sees float32: a step of
8,192 is smaller than float32 resolves near data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.diffusion.form import StudentSampler
from stages.diffusion.grid import Grid
from stages.diffusion.prediction import Array

Denoise = Callable[[Tensor, int], Tensor]
"""x0 as estimated from z at a point of the grid."""
Level = tuple[Any, Any]
"""(alpha, sigma), numbers or what broadcasts against z."""
Fresh = Callable[[], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all samples, or one for each, as diffusers' pipelines take them."""


def ddim_step(z: Array, x0: Array, here: Level, there: Level) -> Array:
    """One deterministic step (Salimans and Ho 2022, 2202.00512, eq. 8): z at `here` to z at `there`."""
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    return alpha_s * x0 + (sigma_s / sigma) * (z - alpha * x0)


def implied_x0(z: Array, z_there: Array, here: Level, there: Level) -> Array:
    """The x0 with which `ddim_step` leads from z to `z_there` at once (2202.00512, algorithm 2); `z_there` itself
    where `there` is clean data."""
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    ratio = sigma_s / sigma
    return (z_there - ratio * z) / (alpha_s - ratio * alpha)


def noising(from_: Level, to: Level) -> tuple[float, float]:
    """(scale, standard deviation) of the noise that leads from a level to a noisier one: alpha_s / alpha_k, and
    sigma_{s|k} with sigma^2_{s|k} = (1 - e^{lambda_s - lambda_k}) sigma_s^2 (2210.03142, section 3.3)."""
    scale = to[0] / from_[0]
    return scale, max(to[1] ** 2 - (scale * from_[1]) ** 2, 0.0) ** 0.5


def sample(name: StudentSampler, denoise: Denoise, noise: Tensor, grid: Grid, generator: Generators = None) -> Tensor:
    """x0 (B, C, H, W) of noise (B, C, H, W), in its dtype, by N calls of `denoise`. `generator` draws what further
    noise there is, on its own device; of a list each draws one sample's, whatever the batch; None: torch's own."""

    def draw(shape: torch.Size, one: torch.Generator | None) -> Tensor:
        device = "cpu" if one is None else one.device
        return torch.randn(shape, generator=one, device=device, dtype=noise.dtype).to(noise.device)

    def fresh() -> Tensor:
        if isinstance(generator, Sequence):
            return torch.stack([draw(noise.shape[1:], one) for one in generator])
        return draw(noise.shape, generator)

    z, step = noise.double(), {"ddim": _ddim, "stochastic": _stochastic, "consistency": _consistency}[name]
    for i in range(grid.steps, 0, -1):
        x0 = denoise(z.to(noise.dtype), i)
        if i == 1:
            return x0
        z = step(z, x0.double(), grid, i, fresh)
    raise AssertionError("a grid has a step at least")


def _ddim(z: Tensor, x0: Tensor, grid: Grid, i: int, fresh: Fresh) -> Tensor:
    return ddim_step(z, x0, grid.level(i), grid.level(i - 1))


def _stochastic(z: Tensor, x0: Tensor, grid: Grid, i: int, fresh: Fresh) -> Tensor:
    """A deterministic step of double length, then one back by noising (2210.03142, section 3.3, after Karras)."""
    far = ddim_step(z, x0, grid.level(i), grid.level(i - 2))
    scale, std = noising(grid.level(i - 2), grid.level(i - 1))
    return scale * far + std * fresh()


def _consistency(z: Tensor, x0: Tensor, grid: Grid, i: int, fresh: Fresh) -> Tensor:
    """Noise the estimate anew (Song et al. 2023, 2303.01469, algorithm 1)."""
    alpha, sigma = grid.level(i - 1)
    return alpha * x0 + sigma * fresh()
