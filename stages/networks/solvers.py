"""Higher-order solvers of the probability-flow ODE, by diffusers' schedulers.

The schedulers assume a variance preserving schedule, alpha^2 + sigma^2 = 1. For other schedules,
z = alpha x0 + sigma noise is divided by sqrt(alpha^2 + sigma^2). The solutions of the ODE are the same, up to this
factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from stages.base import StageError
from stages.diffusion.prediction import Prediction, power, to_noise, to_x0
from stages.diffusion.samplers import Denoise
from stages.diffusion.schedule import NoiseSchedule


def dpmpp_2m(
    denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, prediction: Prediction, grid: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Solve the ODE by DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2).

    The last step, to clean data, is of first order. `denoise` returns the network's output, and is called N times for N
    points of `grid`. Yields (t, z_t) and finally (-1, x0), as `stages.diffusion.samplers.ddim`. Raises StageError if
    the schedule ends in pure noise.
    """
    scheduler = _scheduler(
        DPMSolverMultistepScheduler, schedule, grid, prediction_type="sample", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=grid, device=noise.device)
    preserved = noise / _scale(schedule, grid[0])
    for t, step in zip(grid, scheduler.timesteps, strict=True):
        z = preserved * _scale(schedule, t)
        yield t, z
        x0 = to_x0(prediction, denoise(z, t), z, *schedule.at(t))
        preserved = scheduler.step(x0, step, preserved).prev_sample
    yield -1, preserved


def heun(
    denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, prediction: Prediction, grid: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Solve the ODE by Heun's method in the variable sigma/alpha (Karras et al. 2022, 2206.00364, algorithm 1).

    The last step is an Euler step. `denoise` returns the network's output, and is called 2 N - 1 times for N points of
    `grid`. Yields (t, z_t) and finally (-1, x0), as `stages.diffusion.samplers.ddim`. Raises StageError if the schedule
    ends in pure noise.
    """
    scheduler = _scheduler(HeunDiscreteScheduler, schedule, grid, prediction_type="epsilon")
    scheduler.set_timesteps(timesteps=grid, device=noise.device)
    x = noise / schedule.at(grid[0]).alpha  # the scheduler's variable is z / alpha
    for call, step in enumerate(scheduler.timesteps):
        t = int(step)
        alpha, sigma = schedule.at(t)
        z = x * alpha
        if call % 2 == 0:
            yield t, z
        x = scheduler.step(to_noise(prediction, denoise(z, t), z, alpha, sigma), step, x).prev_sample
    yield -1, x


def _scheduler(kind: Any, schedule: NoiseSchedule, grid: list[int], **settings: Any) -> Any:
    """Create a scheduler of class `kind` with exactly this noise schedule.

    Its `alphas_cumprod` is set, because computing it from betas would round. Raises StageError if the schedule ends in
    pure noise, where sigma/alpha is infinite."""
    if schedule.at(grid[0]).alpha < 1e-6:
        raise StageError(
            f"the teacher's schedule ends in pure noise (alpha = 0), where {kind.__name__} cannot start; "
            "use sampler.name: ddim"
        )
    scheduler = kind(num_train_timesteps=len(schedule), timestep_spacing="trailing", **settings)
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha**2 / power(schedule.alpha, schedule.sigma))
    return scheduler


def _scale(schedule: NoiseSchedule, t: int) -> float:
    """Return sqrt(alpha^2 + sigma^2) at timestep t. It is 1 for a variance preserving schedule."""
    return float(power(*schedule.at(t))) ** 0.5
