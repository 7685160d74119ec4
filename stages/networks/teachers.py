"""What the pair factory asks of a teacher, and which one a sealed folder holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stages.base import Execution
from stages.diffusion.config import Sampler
from stages.diffusion.prediction import Array, Prediction
from stages.diffusion.samplers import ddim, timesteps
from stages.diffusion.schedule import NoiseSchedule
from stages.networks import gaussian

if TYPE_CHECKING:
    from stages.networks.network import NetworkTeacher

Dtype = Literal["float32", "float16", "bfloat16"]


class Teacher(Protocol):
    """A denoiser with its schedule. Arrays are torch tensors or NumPy arrays, as the teacher likes them."""

    latent_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    prediction: Prediction
    device_name: str

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Array, int], Array]: ...
    def encode_prompts(self, prompts: Sequence[str]) -> Array | None: ...
    def to_device(self, array: NDArray[np.floating]) -> Array: ...
    def to_numpy(self, array: Array) -> NDArray[np.floating]: ...
    def inference(self) -> AbstractContextManager[Any]: ...


def load(folder: Path, execution: Execution, *, dtype: Dtype = "float32", compile: bool = False) -> Teacher:
    """The teacher sealed in `folder`. torch is imported only for one that is a network."""
    if (folder / gaussian.FILE).exists():
        return gaussian.GaussianTeacher.load(folder)
    return load_network(folder, execution, dtype=dtype, compile=compile)


def load_network(
    folder: Path, execution: Execution, *, dtype: Dtype = "float32", compile: bool = False
) -> NetworkTeacher:
    """The network sealed in `folder`: in latents if there is a VAE, else in pixels."""
    import torch

    from stages.networks.compute import device_of
    from stages.networks.latent import LatentTeacher
    from stages.networks.pixel import PixelTeacher

    kind = LatentTeacher if (folder / "vae").exists() else PixelTeacher
    return kind(folder, device=device_of(execution), dtype=getattr(torch, dtype), compile=compile)


def trajectory(
    teacher: Teacher, noise: NDArray[np.floating], prompts: list[str], sampler: Sampler
) -> Iterator[tuple[int, Array]]:
    """The teacher's ODE from `noise` (B, C, H, W): (t, z_t) at each point of the sampler's grid, descending, and at
    last (-1, x0), in the teacher's own arrays."""
    grid = timesteps(len(teacher.schedule), sampler.steps, sampler.timestep_spacing)
    denoise = teacher.denoiser(prompts, sampler.guidance_scale)
    start = teacher.to_device(noise)
    if sampler.name == "ddim":
        return ddim(denoise, start, teacher.schedule, teacher.prediction, grid)
    import torch

    from stages.networks import solvers

    solver = {"dpmpp_2m": solvers.dpmpp_2m, "heun": solvers.heun}[sampler.name]
    if isinstance(start, np.ndarray):  # the schedulers of diffusers take tensors only

        def on_tensors(z: Array, t: int) -> Array:
            return torch.from_numpy(denoise(z.numpy(), t))

        states = solver(on_tensors, torch.from_numpy(start), teacher.schedule, teacher.prediction, grid)
        return ((t, z.numpy()) for t, z in states)
    return solver(denoise, start, teacher.schedule, teacher.prediction, grid)


def solve(teacher: Teacher, noise: NDArray[np.floating], prompts: list[str], sampler: Sampler) -> Array:
    """The end of the trajectory: what the ODE makes of `noise`."""
    *_, (_, x0) = trajectory(teacher, noise, prompts, sampler)
    return x0
