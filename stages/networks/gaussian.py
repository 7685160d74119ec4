"""An analytic teacher for tests and simulations: its data is N(mean, std^2) in every dimension. It needs no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.diffusion.prediction import Prediction
from stages.diffusion.samplers import Guidance, Solver
from stages.diffusion.schedule import NoiseSchedule

FILE = "gaussian.json"


class GaussianTeacher:
    """The optimal epsilon-predicting denoiser of N(mean, std^2), on Stable Diffusion's schedule.

    Samples have the shape `shape`, (C, H, W). The output does not depend on the prompt or the guidance scale. Each call
    sleeps for `delay` seconds to simulate a network.
    """

    prediction: Prediction = "epsilon"
    device_name = "cpu"

    def __init__(self, mean: float, std: float, shape: tuple[int, int, int], delay: float = 0.0) -> None:
        self.mean, self.std, self.latent_shape, self.delay = mean, std, shape, delay
        self.schedule = NoiseSchedule.stable_diffusion()

    @classmethod
    def load(cls, folder: Path) -> GaussianTeacher:
        """Load the teacher from gaussian.json in `folder`."""
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(values["mean"], values["std"], tuple(values["shape"]), values["delay"])

    def denoiser(
        self, prompts: Sequence[str], guidance_scale: Guidance
    ) -> Callable[[NDArray[np.floating], int], NDArray[np.floating]]:
        """Return `denoise(z, t)`, the conditional mean of the noise at z (B, C, H, W) and timestep t.

        It is sigma / (alpha^2 std^2 + sigma^2) (z - alpha mean)."""

        def denoise(z: NDArray[np.floating], t: int) -> NDArray[np.floating]:
            if self.delay:
                time.sleep(self.delay)
            alpha, sigma = self.schedule.at(t)
            variance = alpha**2 * self.std**2 + sigma**2
            return (sigma / variance) * (z - alpha * self.mean)

        return denoise

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        return self.latent_shape

    def trajectory(
        self,
        solver: Solver,
        noise: NDArray[np.floating],
        prompts: Sequence[str],
        guidance_scale: Guidance,
        grid: list[int],
    ) -> Iterator[tuple[int, NDArray[np.floating]]]:
        return solver(self.denoiser(prompts, guidance_scale), noise, self.schedule, self.prediction, grid)

    def to_device(self, array: NDArray[np.floating]) -> NDArray[np.floating]:
        return array.astype(np.float32)

    def to_numpy(self, array: NDArray[np.floating]) -> NDArray[np.floating]:
        return array

    def inference(self) -> AbstractContextManager[None]:
        return nullcontext()
