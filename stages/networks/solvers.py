"""Higher-order solvers, through diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler
from torch import Tensor

from stages.base import StageError
from stages.diffusion.prediction import Prediction, to_noise, to_x0
from stages.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Tensor, int], Tensor]


def dpmpp_2m(
    denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, prediction: Prediction, grid: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2), its last step, to clean data, of first order.

    Yields as `stages.diffusion.samplers.ddim`; calls the network as often.
    """
    scheduler = _scheduler(
        DPMSolverMultistepScheduler, schedule, grid, prediction_type="sample", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=grid, device=noise.device)
    z = noise
    for t, step in zip(grid, scheduler.timesteps, strict=True):
        yield t, z
        x0 = to_x0(prediction, denoise(z, t), z, *schedule.at(t))
        z = scheduler.step(x0, step, z).prev_sample
    yield -1, z


def heun(
    denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, prediction: Prediction, grid: list[int]
) -> Iterator[tuple[int, Tensor]]:
    """Heun's method in sigma/alpha (Karras et al. 2022, 2206.00364, algorithm 1), its last step an Euler step.

    Yields as `ddim`; calls the network 2 N - 1 times for N points of the grid.
    """
    scheduler = _scheduler(HeunDiscreteScheduler, schedule, grid, prediction_type="epsilon")
    scheduler.set_timesteps(timesteps=grid, device=noise.device)
    x = noise / schedule.at(grid[0])[0]  # the scheduler's variable is z / alpha
    for call, step in enumerate(scheduler.timesteps):
        t = int(step)
        alpha, sigma = schedule.at(t)
        z = x * alpha
        if call % 2 == 0:
            yield t, z
        x = scheduler.step(to_noise(prediction, denoise(z, t), z, alpha, sigma), step, x).prev_sample
    yield -1, x


def _scheduler(kind: Any, schedule: NoiseSchedule, grid: list[int], **settings: Any) -> Any:
    """A scheduler on exactly this schedule; its own betas would be rounded. Raises StageError for a schedule that
    ends in pure noise, where sigma/alpha is infinite."""
    if schedule.at(grid[0])[0] < 1e-6:
        raise StageError(
            f"the teacher's schedule ends in pure noise (alpha = 0), where {kind.__name__} cannot start; "
            "use sampler.name: ddim"
        )
    scheduler = kind(num_train_timesteps=len(schedule), timestep_spacing="trailing", **settings)
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha**2)
    return scheduler
