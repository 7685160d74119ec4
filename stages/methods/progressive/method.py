"""Progressive and guided distillation: the loss of one round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.base import StageError
from stages.diffusion.guidance import draw_w
from stages.diffusion.halving import two_step_target
from stages.diffusion.weighting import weights
from stages.methods.base import Materials, images_of
from stages.methods.halving import HalvingConfig
from stages.networks.condition import Condition
from stages.training import Batch, Player, Turn


class Progressive:
    """One round of progressive or guided distillation. Minimises E[weight(lambda_t) |x~ - x^(z_t, c, w)|^2].

    x^ is the student's estimate of x0. In a round that halves the steps, one DDIM step with the target x~ leads to the
    same point as two DDIM steps of the teacher (Salimans and Ho 2022, 2202.00512, algorithm 2). In a round that keeps
    the number of steps, x~ is the teacher's estimate at z_t. If the student takes w, this estimate is guided:
    x~ = (1 + w) x_c(z_t) - w x_u(z_t), where x_c is the conditional and x_u the unconditional estimate (Meng et al.
    2023, 2210.03142, section 3.1)."""

    def __init__(self, config: HalvingConfig, materials: Materials) -> None:
        self.config = config
        self.student = materials.student(config.form)
        if config.weighting == "snr" and self.student.alpha[-1] == 0:
            raise StageError("weighting: snr is 0 in pure noise, where the teacher's schedule ends")
        teacher_form = config.form.model_copy(update={"steps": config.start_steps})
        self.teacher = materials.previous_student() or materials.teacher_denoiser(teacher_form)
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss, and the unweighted error of x0 as a figure.

        `batch`: latents or pairs. The points i are drawn uniformly from 1 to N, and w from
        U[w_min, w_max] if the student takes w."""
        images, w_range = images_of(batch), self.student.form.w_range
        x, prompts = images["latent"], images["prompts"]
        i = torch.randint(1, self.student.form.steps + 1, (len(x),)).to(x.device)
        w = draw_w(w_range, len(x)).to(x.device) if w_range else None
        z = self.student.noised(x, torch.randn_like(x), i)
        # The target is a difference of nearly equal numbers, so it needs full precision even in bf16 training.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            target = self.target(z, i, self.teacher.encode(prompts), w)
        error = self.student.error(z, i, target, self.student.encode(prompts), w)
        weight = weights(self.config.weighting, self.student.alpha[i], self.student.sigma[i])
        return (weight.to(error.dtype) * error).mean(), {"x0_error": error.mean()}

    def target(self, z: Tensor, i: Tensor, condition: Condition, w: Tensor | None) -> Tensor:
        """Return the target x~ (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of the student's grid."""
        if not self.config.halves:
            return self.teacher.x0(z, i, condition, w).double()

        def denoise(z: Tensor, j: Tensor) -> Tensor:
            return self.teacher.x0(z, j, condition, w)

        return two_step_target(denoise, z, i, self.teacher.grid, self.student.form.sampler == "stochastic")

    def after_step(self, step: int) -> None:
        pass
