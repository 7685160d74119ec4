"""Consistency distillation with the guided solver of latent consistency models (LCM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.diffusion.few_step import ddim_step
from stages.diffusion.guidance import draw_w
from stages.methods.base import Materials, images_of
from stages.networks.compute import shared_copy
from stages.networks.student import column
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.methods.consistency.config import ConsistencyConfig


class Consistency:
    """Consistency distillation (Song et al. 2023, 2303.01469, algorithm 2) with the guided solver and the skipped steps
    of LCM (Luo et al. 2023, 2310.04378, algorithm 1).

    Minimises d(f(z_{n+k}, c, w), f-(z_n, c, w)). z_{n+k} is k timesteps noisier than z_n. One guided DDIM step of the
    teacher leads from z_{n+k} to z_n. f is the student, which is the identity at clean data (the boundary condition).
    f- has the exponential moving average of its weights. No gradient flows through f-. At the point next to clean data
    the target is the teacher's own estimate of x0."""

    def __init__(self, config: ConsistencyConfig, materials: Materials) -> None:
        self.config = config
        self.student = materials.student(config.form, config.solver_steps)
        self.teacher = materials.teacher_denoiser(config.form.model_copy(update={"steps": config.solver_steps}))
        self.distance = materials.distance(config.loss)
        self.target = shared_copy(self.student)
        training = materials.training
        self.players = {
            "student": Player(self.student, training),
            "target": Player(self.target, training, averaged=False),  # never trained; checkpoints keep it
        }

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar. `batch`: latents or pairs.

        The points i are drawn uniformly from 1 to `solver_steps`, and w from U[w_min, w_max] if the student takes w."""
        images = images_of(batch)
        x, condition = images["latent"], self.student.encode(images["prompts"])
        i = torch.randint(1, self.student.grid.steps + 1, (len(x),)).to(x.device)
        w = draw_w(self.config.w_range, len(x)).to(x.device) if self.config.w_range else None
        z = self.student.noised(x, torch.randn_like(x), i)
        with torch.no_grad():
            end = self.teacher.x0(z, i, self.teacher.encode(images["prompts"]), w)
            nearer = ddim_step(z, end, self.student.level(i, z), self.student.level(i - 1, z))
            target = torch.where(column(i, i) == 1, end, self.target.x0(nearer, (i - 1).clip(1), condition, w))
        return self.distance(self.student.x0(z, i, condition, w), target).mean(), {}

    def after_step(self, step: int) -> None:
        """Update the target weights: theta- = decay theta- + (1 - decay) theta."""
        with torch.no_grad():
            for mean, value in zip(self.target.parameters(), self.student.parameters(), strict=True):
                if mean is not value:  # the frozen weights of a LoRA student are shared
                    mean.lerp_(value, 1 - self.config.target_decay)
