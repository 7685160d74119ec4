"""Particles without sides: latents, and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stages.data.pictures import strip
from stages.networks.adapter import Adapter
from stages.optimize.representations.base import Rendering, Representation, Views


class Flat(Representation):
    """Particles that are tensors of one shape. `state` holds them."""

    def __init__(self, teacher: Adapter, start: Tensor) -> None:
        """`start`: the particles before training (N, ...)."""
        super().__init__(teacher, len(start))
        self.state = nn.ParameterList([nn.Parameter(particle) for particle in start.to(teacher.device)])

    def chosen(self, views: Views) -> Tensor:
        """Return the particles in the views, (B, ...)."""
        return torch.stack([self.state[number] for number in views.particles.tolist()])

    def save(self, folder: Path) -> None:
        """Also write the images to `images/PARTICLE.png`."""
        super().save(folder)
        (folder / "images").mkdir(exist_ok=True)
        for number in range(self.count):
            image = self.images(Views(torch.tensor([number]))).numpy()
            Image.fromarray(strip(image)).save(folder / "images" / f"{number:04}.png")


class Latents(Flat):
    """The latents themselves. The decoder may decode them badly if they are unlike the latents of its training."""

    def __init__(self, teacher: Adapter, count: int) -> None:
        super().__init__(teacher, torch.randn(count, *teacher.latent_shape))

    def render(self, views: Views) -> Rendering:
        return Rendering(self.chosen(views), {})

    @torch.no_grad()
    def images(self, views: Views) -> Tensor:
        return self.teacher.decode(self.chosen(views))

    def save(self, folder: Path) -> None:
        """Also write the latents to `latents.npy`, (N, C, h, w) float32."""
        super().save(folder)
        np.save(folder / "latents.npy", torch.stack(list(self.state)).detach().cpu().numpy(), allow_pickle=False)


class Images(Flat):
    """Images (N, 3, H, W), trained in pixels. `images` returns them clamped to [-1, 1]. `render` does not clamp,
    because clamped values would get no gradient."""

    def __init__(self, teacher: Adapter, count: int) -> None:
        height, width = (side * teacher.down_sampling for side in teacher.latent_shape[1:])
        super().__init__(teacher, torch.rand(count, 3, height, width) * 2 - 1)

    def render(self, views: Views) -> Rendering:
        return Rendering(self.teacher.encode_with_gradient(self.chosen(views)), {})

    @torch.no_grad()
    def images(self, views: Views) -> Tensor:
        return self.chosen(views).float().cpu().clamp(-1, 1)
