"""The exact teacher: the optimal denoiser of a set of images, in the latents of a pipeline.

It needs no training, and its scores and densities are known. Its map from noise to images is harder to learn with more
images and with a smaller spread. Planning imports this module, so it imports neither torch nor NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import StageError
from stages.networks.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition

FILE, LATENTS = "exact.json", "exact.npy"
"""Two files beside the pipeline of an exact teacher. The first has the spread and the images' captions. The second has
their latents (N, C, H, W), float32."""
CAPTION, ANY = "caption", -1
"""The name of the condition's tensor: numbers of captions (B,). ANY is the number of the empty prompt."""


class Exact(Adapter):
    """A pipeline whose teacher is the optimal denoiser of a set of images, in place of its network.

    For a prompt, the denoiser is that of the images with this caption; for the empty prompt, that of all images.
    Students, discriminators and fake scores start from the pipeline's network, and take its conditions."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        import numpy as np
        import torch

        super().__init__(folder, device=device, dtype=dtype)
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        latents = torch.from_numpy(np.load(folder / LATENTS, allow_pickle=False))
        self.data = latents.flatten(1).to(self.device, torch.float64)
        self.spread: float = about["spread"]
        self.captions: dict[str, int] = {caption: n for n, caption in enumerate(dict.fromkeys(about["captions"]))}
        numbers = [self.captions[caption] for caption in about["captions"]]
        self.numbers = torch.tensor(numbers, device=self.device)

    def teacher_condition(self, prompts: Sequence[str]) -> Condition:
        import torch

        from stages.networks.condition import Condition

        if any(prompts) and not any(self.captions):
            raise StageError("the exact teacher has captions: none; leave prompts out")
        unknown = next((prompt for prompt in prompts if prompt and prompt not in self.captions), None)
        if unknown is not None:
            some = ", ".join(map(repr, list(self.captions)[:5]))
            raise StageError(f"{unknown!r} is not a caption of the exact teacher's images; captions are {some}, ...")
        numbers = [self.captions[prompt] if prompt else ANY for prompt in prompts]
        return Condition(len(numbers), {CAPTION: torch.tensor(numbers, device=self.device)})

    def teacher_dropped(self) -> Condition:
        return self.teacher_condition([""])

    def output(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """Return the optimal output, computed in float64 and rounded to float32, in the network's prediction type."""
        from stages.diffusion.prediction import target

        x0, _ = self.posterior(z, level, condition)
        z, (alpha, sigma) = z.double(), self._columns(z, level)
        shape = (-1, *[1] * (z.ndim - 1))
        alpha, sigma = alpha.view(shape), sigma.view(shape)
        return target(self.prediction, x0, (z - alpha * x0) / sigma, alpha, sigma).float()

    def posterior(self, z: Tensor, level: Level, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return (E[x0 | z], log p(z)) for z (B, C, H, W): (B, C, H, W) and (B,), both float64.

        The score, the gradient of log p(z), is (alpha E[x0 | z] - z) / sigma^2."""
        from stages.diffusion.mixture import posterior

        wanted = condition.tensors[CAPTION][:, None]
        allowed = None if bool((wanted == ANY).all()) else (self.numbers == wanted) | (wanted == ANY)
        flat = z.flatten(1).double()
        x0, log_density = posterior(flat, self.data, *self._columns(z, level), self.spread, allowed)
        return x0.view(z.shape), log_density

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the mean squared difference between each of `latents` (B, C, H, W) and the nearest image, (B,).

        Float64. Memorised images give about the square of the spread, or less."""
        from stages.diffusion.mixture import nearest

        return nearest(latents.flatten(1).to(self.data), self.data) / self.data.shape[1]

    def _columns(self, z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of `level` as (B, 1), float64."""
        import torch

        columns = (torch.as_tensor(value, dtype=torch.float64, device=z.device) for value in (level.alpha, level.sigma))
        alpha, sigma = (column.reshape(-1, 1).expand(len(z), 1) for column in columns)
        return alpha, sigma


@cache
def exact(family: type[Adapter]) -> type[Adapter]:
    """Return the adapter of exact teachers whose pipeline is of `family`."""
    made: Any = type(f"Exact{family.__name__}", (Exact, family), {})
    return made
