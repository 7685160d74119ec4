from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.diffusion.guidance import draw
from stages.diffusion.halving import two_step_target
from stages.diffusion.weighting import weights
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.guided.config import GuidedConfig


class Guided:
    """A link of Meng et al. 2023, 2210.03142: minimise w(lambda_t) |x~ - x^(z_t, w)|^2, w drawn evenly from the range
    for each sample.

    Stage one (section 3.1): x~ = (1 + w) x_c(z_t) - w x_0(z_t), what the teacher makes of z_t with and without its
    prompt. Stage two (section 3.2): one step with x~ leads where two of the student before do, at the same w."""

    def __init__(self, config: GuidedConfig, materials: Materials) -> None:
        self.config, self.encode = config, materials.teacher.encode_prompts
        self.student = materials.student(config.form)
        self.teacher = materials.before() or materials.many_step(config.form)
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latent (B, C, H, W), prompts (B strings)."""
        x, condition = batch["latent"], self.encode(batch["prompts"])
        i = torch.randint(1, self.student.form.steps + 1, (len(x),)).to(x.device)
        w = draw(self.config.w_range, len(x)).to(x.device)
        z = self.student.noised(x, torch.randn_like(x), i)
        with torch.no_grad():
            target = self.target(z, i, condition, w)
        error = self.student.error(z, i, target, condition, w)
        weight = weights(self.config.weighting, self.student.alpha[i], self.student.sigma[i])
        return (weight.to(error.dtype) * error).mean(), {"x0_error": error.mean()}

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor) -> Tensor:
        """x~ (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of the student's."""
        if self.config.learns_guidance:
            return self.teacher.x0(z, i, condition, w).double()
        stochastic = self.config.sampler == "stochastic"
        return two_step_target(lambda z, j: self.teacher.x0(z, j, condition, w), z, i, self.teacher.grid, stochastic)

    def after_step(self, step: int) -> None:
        pass
