"""Loads teachers from sealed folders, and solves their ODE."""

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
from stages.diffusion.samplers import Denoise, Guidance, Solver, ddim, timesteps
from stages.diffusion.schedule import NoiseSchedule
from stages.networks import gaussian
from stages.networks.adapters import adapter_of

if TYPE_CHECKING:
    from stages.networks.adapter import Adapter

Dtype = Literal["float32", "float16", "bfloat16"]


class Teacher(Protocol):
    """A denoiser with its noise schedule. `Array` is a torch tensor or a NumPy array, whichever the teacher uses."""

    latent_shape: tuple[int, int, int]
    """(C, H, W)."""

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """The shape of the noise from which a trajectory starts."""

    schedule: NoiseSchedule
    prediction: Prediction
    device_name: str
    """The GPU model, or `cpu`."""

    def denoiser(self, prompts: Sequence[str], guidance_scale: Guidance) -> Callable[[Array, int], Array]:
        """Return `denoise(z, t)`, the guided output at z (B, C, H, W) and timestep t for B prompts."""

    def trajectory(
        self, solver: Solver, noise: Array, prompts: Sequence[str], guidance_scale: Guidance, grid: list[int]
    ) -> Iterator[tuple[int, Array]]:
        """Solve the ODE from `noise` (B, C, H, W). Yields (t, z_t) at each timestep of the descending `grid`, and
        finally (-1, x0)."""

    def to_device(self, array: NDArray[np.floating]) -> Array:
        """Convert a NumPy array to the teacher's kind of array, in float32."""

    def to_numpy(self, array: Array) -> NDArray[np.floating]:
        """Convert the teacher's kind of array to a NumPy array."""

    def inference(self) -> AbstractContextManager[Any]:
        """Return a context in which no gradients are recorded."""


def load(folder: Path, execution: Execution, *, dtype: Dtype = "float32", compile: bool = False) -> Teacher:
    """Load the teacher that is sealed in `folder`. Torch is imported only if the teacher is a network."""
    if (folder / gaussian.FILE).exists():
        return gaussian.GaussianTeacher.load(folder)
    return load_network(folder, execution, dtype=dtype, compile=compile)


def load_network(folder: Path, execution: Execution, *, dtype: Dtype = "float32", compile: bool = False) -> Adapter:
    """Load the pipeline in `folder` with the adapter of its family. Raises Unsupported and PluginError."""
    import torch

    from stages.networks.compute import device_of

    return adapter_of(folder)(folder, device=device_of(execution), dtype=getattr(torch, dtype), compile=compile)


def trajectory(
    teacher: Teacher,
    noise: NDArray[np.floating],
    prompts: list[str],
    sampler: Sampler,
    scales: NDArray[np.float32] | None = None,
) -> Iterator[tuple[int, Array]]:
    """Solve the teacher's probability-flow ODE from `noise` (B, C, H, W) with `sampler`. Yields what
    `Teacher.trajectory` yields, at the timesteps of the sampler's grid.

    scales: (B,), the guidance scale of each sample. None: the sampler's scale for all samples."""
    grid = timesteps(len(teacher.schedule), sampler.steps, sampler.timestep_spacing)
    start = teacher.to_device(noise)
    scale = sampler.guidance_scale if scales is None else scales
    assert not isinstance(scale, tuple), "a range of guidance scales needs `scales`"
    return teacher.trajectory(_solver(sampler.name), start, prompts, scale, grid)


def _solver(name: str) -> Solver:
    """Return the solver of this name, which takes NumPy arrays too."""
    if name == "ddim":
        return ddim
    import torch

    from stages.networks import solvers

    solver = {"dpmpp_2m": solvers.dpmpp_2m, "heun": solvers.heun}[name]

    def on_arrays(
        denoise: Denoise, noise: Array, schedule: NoiseSchedule, prediction: Prediction, grid: list[int]
    ) -> Iterator[tuple[int, Array]]:
        if not isinstance(noise, np.ndarray):
            return solver(denoise, noise, schedule, prediction, grid)

        def on_tensors(z: Array, t: int) -> Array:  # diffusers' schedulers take only tensors
            return torch.from_numpy(denoise(z.numpy(), t))

        return ((t, z.numpy()) for t, z in solver(on_tensors, torch.from_numpy(noise), schedule, prediction, grid))

    return on_arrays


def solve(
    teacher: Teacher,
    noise: NDArray[np.floating],
    prompts: list[str],
    sampler: Sampler,
    scales: NDArray[np.float32] | None = None,
) -> Array:
    """Return x0 (B, C, H, W), the end of the `trajectory` with the same arguments."""
    *_, (_, x0) = trajectory(teacher, noise, prompts, sampler, scales)
    return x0
