"""Samplers of few-step students.

The state z is float64 between network calls, and is cast to the noise's dtype for each call. With thousands of steps, a
step near the data is smaller than float32 resolves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stages.diffusion.form import StudentSampler
from stages.diffusion.grid import Grid
from stages.diffusion.prediction import Array
from stages.diffusion.schedule import Level

Denoise = Callable[[Tensor, int], Tensor]
"""A function (z, i) -> the network's estimate of x0 at point i of the grid, shaped as z."""
DrawNoise = Callable[[], Tensor]
"""A function that returns new standard normal noise, shaped as z."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one for each sample, as in diffusers' pipelines. None: torch's global generator."""


def ddim_step(z: Array, x0: Array, level_t: Level, level_s: Level) -> Array:
    """Take one deterministic DDIM step from z_t to z_s, given an estimate of x0. Returns z_s.

    z_s = alpha_s x0 + (sigma_s / sigma_t) (z_t - alpha_t x0) (Salimans and Ho 2022, 2202.00512, eq. 8)."""
    (alpha, sigma), (alpha_s, sigma_s) = level_t, level_s
    return alpha_s * x0 + (sigma_s / sigma) * (z - alpha * x0)


def implied_x0(z: Array, z_s: Array, level_t: Level, level_s: Level) -> Array:
    """Return the x0 for which one `ddim_step` leads from z_t to z_s. It is z_s itself if level_s is clean data.

    x0 = (z_s - r z_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t (2202.00512, algorithm 2)."""
    (alpha, sigma), (alpha_s, sigma_s) = level_t, level_s
    ratio = sigma_s / sigma
    return (z_s - ratio * z) / (alpha_s - ratio * alpha)


def noising(level_k: Level, level_s: Level) -> tuple[float, float]:
    """Return (scale, std) such that z_s = scale z_k + std noise leads from level k to the noisier level s.

    scale = alpha_s / alpha_k and std^2 = sigma_s^2 - scale^2 sigma_k^2 = (1 - e^{lambda_s - lambda_k}) sigma_s^2
    (2210.03142, section 3.3)."""
    scale = level_s.alpha / level_k.alpha
    return scale, max(level_s.sigma**2 - (scale * level_k.sigma) ** 2, 0.0) ** 0.5


def states(
    name: StudentSampler, denoise: Denoise, noise: Tensor, grid: Grid, generator: Generators = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, z, x0) at each point i = N, ..., 1 of the grid: the state that the network is given, and its estimate.

    noise, z and x0 are (B, C, H, W), of the noise's dtype. `denoise` is called once for each point.

    `ddim` is deterministic (2202.00512, eq. 8). `stochastic` is the N-step stochastic sampler of 2210.03142,
    section 3.3. `consistency` is multistep consistency sampling (2303.01469, algorithm 1). The last two draw more noise
    from `generator`, on the generator's device. If each sample has its own generator, samples do not depend on the
    other samples of their batch."""

    def draw(shape: torch.Size, source: torch.Generator | None) -> Tensor:
        device = "cpu" if source is None else source.device
        return torch.randn(shape, generator=source, device=device, dtype=noise.dtype).to(noise.device)

    def draw_noise() -> Tensor:
        if isinstance(generator, Sequence):
            return torch.stack([draw(noise.shape[1:], source) for source in generator])
        return draw(noise.shape, generator)

    z, step = noise.double(), {"ddim": _ddim, "stochastic": _stochastic, "consistency": _consistency}[name]
    for i in range(grid.steps, 0, -1):
        given = z.to(noise.dtype)
        x0 = denoise(given, i)
        yield i, given, x0
        if i > 1:
            z = step(z, x0.double(), grid, i, draw_noise)


def _ddim(z: Tensor, x0: Tensor, grid: Grid, i: int, draw_noise: DrawNoise) -> Tensor:
    """Take a DDIM step from point i to point i - 1."""
    return ddim_step(z, x0, grid.level(i), grid.level(i - 1))


def _stochastic(z: Tensor, x0: Tensor, grid: Grid, i: int, draw_noise: DrawNoise) -> Tensor:
    """Take a DDIM step of twice the length, and then go back one step by adding noise (2210.03142, section 3.3)."""
    far = ddim_step(z, x0, grid.level(i), grid.level(i - 2))
    scale, std = noising(grid.level(i - 2), grid.level(i - 1))
    return scale * far + std * draw_noise()


def _consistency(z: Tensor, x0: Tensor, grid: Grid, i: int, draw_noise: DrawNoise) -> Tensor:
    """Add new noise to the estimate: z = alpha x0 + sigma noise (Song et al. 2023, 2303.01469, algorithm 1)."""
    alpha, sigma = grid.level(i - 1)
    return alpha * x0 + sigma * draw_noise()
