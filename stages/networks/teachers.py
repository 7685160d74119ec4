"""What the pair factory asks of a teacher, and which one a sealed folder holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.base import Execution
from stages.diffusion.config import Sampler
from stages.diffusion.prediction import Array, Prediction
from stages.diffusion.samplers import ddim, timesteps
from stages.diffusion.schedule import NoiseSchedule
from stages.networks import gaussian

Dtype = Literal["float32", "float16", "bfloat16"]


class Teacher(Protocol):
    """A denoiser with its schedule. Arrays are torch tensors or NumPy arrays, as the teacher likes them."""

    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: Prediction
    device_name: str

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Array, int], Array]: ...
    def to_device(self, array: NDArray[np.floating]) -> Array: ...
    def to_numpy(self, array: Array) -> NDArray[np.floating]: ...
    def inference(self) -> AbstractContextManager[Any]: ...


def load(folder: Path, execution: Execution, *, dtype: Dtype = "float32", compile: bool = False) -> Teacher:
    """The teacher sealed in `folder`. torch is imported only for one that is a network."""
    if (folder / gaussian.FILE).exists():
        return gaussian.GaussianTeacher.load(folder)
    import torch

    from stages.networks.compute import device_of
    from stages.networks.latent import LatentTeacher

    return LatentTeacher(folder, device=device_of(execution), dtype=getattr(torch, dtype), compile=compile)


def solve(teacher: Teacher, noise: NDArray[np.floating], prompts: list[str], sampler: Sampler) -> Array:
    """The teacher's ODE from `noise` (B, C, H, W) to latents, in the teacher's own arrays."""
    grid = timesteps(len(teacher.schedule), sampler.steps, sampler.timestep_spacing)
    denoise = teacher.denoiser(prompts, sampler.guidance_scale)
    return ddim(denoise, teacher.to_device(noise), teacher.schedule, teacher.prediction, grid)
