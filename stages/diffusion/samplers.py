"""The DDIM solver of the probability-flow ODE, from noise to data, and its timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.diffusion.prediction import Array, Prediction, to_noise, to_x0
from stages.diffusion.schedule import NoiseSchedule

Spacing = Literal["trailing", "leading"]
Denoise = Callable[[Array, int], Array]
"""`denoise(z, t)`: the network's output at z (B, C, H, W) and timestep t, guided if needed."""
Guidance = float | NDArray[np.float32]
"""One guidance scale for all samples of a batch, or an array (B,) of one for each."""
Solver = Callable[[Denoise, Array, NoiseSchedule, Prediction, list[int]], Iterator[tuple[int, Array]]]
"""`solver(denoise, noise, schedule, prediction, grid)`, such as `ddim`."""


def timesteps(train_steps: int, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """Return the N = `steps` timesteps at which the network is called, in descending order. T is `train_steps`.

    trailing: round(T (N - i) / N) - 1 for i = 0, ..., N - 1. The first is T - 1, the noisiest timestep.
    leading: floor(T / N) i + 1 for i = N - 1, ..., 0, as in diffusers with `steps_offset=1`. The first is less noisy.

    The two are compared in Lin et al. 2023, 2305.08891, table 2. Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps must be between 1 and {train_steps}, not {steps}")
    if spacing == "trailing":
        return [round(train_steps * (steps - i) / steps) - 1 for i in range(steps)]
    return [(train_steps // steps) * i + 1 for i in reversed(range(steps))]


def ddim(
    denoise: Denoise,
    noise: Array,
    schedule: NoiseSchedule,
    prediction: Prediction,
    grid: list[int],
) -> Iterator[tuple[int, Array]]:
    """Solve the ODE by DDIM with eta = 0, from `noise` to clean data (Song et al. 2021, 2010.02502, eq. 12).

    A step computes z_s = alpha_s x0 + sigma_s noise from the network's estimates of x0 and noise at z_t.
    `denoise(z, t)` returns the network's output, guided if needed, shaped as `z`. It is called once for each t of
    `grid`. Yields (t, z_t) before each call, and finally (-1, x0).

    Each step goes to the next point of `grid`. diffusers' DDIMScheduler goes to t - T // N instead, for T training
    timesteps and N steps, and so leaves its own grid unless N divides T.
    """
    z = noise
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        alpha, sigma = schedule.at(t)
        alpha_s, sigma_s = schedule.at(s)
        yield t, z
        output = denoise(z, t)
        x0 = to_x0(prediction, output, z, alpha, sigma)
        z = alpha_s * x0 + sigma_s * to_noise(prediction, output, z, alpha, sigma) if s >= 0 else x0
    yield -1, z
