from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.diffusion.halving import two_step_target
from stages.diffusion.weighting import weights
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.progressive.config import ProgressiveConfig


class Progressive:
    """One round of Salimans and Ho 2022, 2202.00512, algorithm 2: w(lambda_t) |x~ - x^(z_t)|^2, where one DDIM step
    with x~ leads where two of the teacher's do."""

    def __init__(self, config: ProgressiveConfig, materials: Materials) -> None:
        self.encode = materials.teacher.encode_prompts
        self.student = materials.student(config.form)
        twice = config.form.model_copy(update={"steps": config.start_steps})
        self.teacher = materials.before() or materials.many_step(twice)
        self.weighting = config.weighting
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latent (B, C, H, W), prompts (B strings)."""
        x, condition = batch["latent"], self.encode(batch["prompts"])
        i = torch.randint(1, self.student.form.steps + 1, (len(x),)).to(x.device)
        z = self.student.noised(x, torch.randn_like(x), i)
        with torch.no_grad():
            target = two_step_target(lambda z, j: self.teacher.x0(z, j, condition), z, i, self.teacher.grid)
        error = self.student.error(z, i, target, condition)
        weight = weights(self.weighting, self.student.alpha[i], self.student.sigma[i])
        return (weight.to(error.dtype) * error).mean(), {"x0_error": error.mean()}

    def after_step(self, step: int) -> None:
        pass
