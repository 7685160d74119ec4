from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.base import StageError
from stages.diffusion.guidance import draw_w
from stages.diffusion.halving import two_step_target
from stages.diffusion.weighting import weights
from stages.methods.base import Materials
from stages.methods.halving import HalvingConfig
from stages.training import Batch, Player, Turn


class Progressive:
    """One round of Salimans and Ho 2022, 2202.00512, algorithm 2: minimise w(lambda_t) |x~ - x^(z_t)|^2, where one DDIM
    step with x~ leads where two of the teacher's do.

    In a round that halves nothing x~ is what the teacher makes of z_t, guided by w where the student takes it. With it
    a student learns to predict v where its teacher predicts epsilon, or to take w as an input (Meng et al. 2023,
    2210.03142, section 3.1: x~ = (1 + w) x_c(z_t) - w x_0(z_t), with and without the prompt)."""

    def __init__(self, config: HalvingConfig, materials: Materials) -> None:
        self.config, self.encode = config, materials.teacher.encode_prompts
        self.student = materials.student(config.form)
        if config.weighting == "snr" and self.student.alpha[-1] == 0:
            raise StageError("weighting: snr counts nothing in pure noise, where the teacher's schedule ends")
        of_teacher = config.form.model_copy(update={"steps": config.start_steps})
        self.teacher = materials.before() or materials.many_step(of_teacher)
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: latent (B, C, H, W), prompts (B strings). Points i, and w where the student takes it, are drawn
        evenly."""
        x, condition, w_range = batch["latent"], self.encode(batch["prompts"]), self.student.form.w_range
        i = torch.randint(1, self.student.form.steps + 1, (len(x),)).to(x.device)
        w = draw_w(w_range, len(x)).to(x.device) if w_range else None
        z = self.student.noised(x, torch.randn_like(x), i)
        # a target is a difference of nearly equal numbers: in full precision, whatever the student trains in
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            wanted = self.target(z, i, condition, w)
        error = self.student.error(z, i, wanted, condition, w)
        weight = weights(self.config.weighting, self.student.alpha[i], self.student.sigma[i])
        return (weight.to(error.dtype) * error).mean(), {"x0_error": error.mean()}

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor | None) -> Tensor:
        """x~ (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of the student's."""
        if not self.config.halves:
            return self.teacher.x0(z, i, condition, w).double()

        def denoise(z: Tensor, j: Tensor) -> Tensor:
            return self.teacher.x0(z, j, condition, w)

        return two_step_target(denoise, z, i, self.teacher.grid, self.student.form.sampler == "stochastic")

    def after_step(self, step: int) -> None:
        pass
