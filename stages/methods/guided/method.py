from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.base import StageError
from stages.diffusion.guidance import draw
from stages.diffusion.halving import two_step_target
from stages.diffusion.weighting import weights
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.guided.config import GuidedConfig
from stages.networks.denoiser import Denoiser


class Guided:
    """What both stages of Meng et al. 2023, 2210.03142, share: w(lambda_t) |x~ - x^(z_t, w)|^2 with w drawn evenly from
    the range for each sample."""

    def __init__(self, config: GuidedConfig, materials: Materials, teacher: Denoiser) -> None:
        self.encode = materials.teacher.encode_prompts
        self.student, self.teacher = materials.student(config.form), teacher
        self.config = config
        self.players = {"student": Player(self.student, materials.training)}

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor) -> Tensor:
        """x~ (B, C, H, W) for z (B, C, H, W) at points i (B,) of the student's."""
        raise NotImplementedError

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

    def after_step(self, step: int) -> None:
        pass


class LearnGuidance(Guided):
    """Stage one (2210.03142, section 3.1, eq. 2): the target is the teacher's guided output, (1 + w) x_c - w x_0."""

    def __init__(self, config: GuidedConfig, materials: Materials) -> None:
        super().__init__(config, materials, materials.many_step(config.form))

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor) -> Tensor:
        return self.teacher.x0(z, i, condition, w).double()


class GuidedHalving(Guided):
    """Stage two (2210.03142, section 3.2): progressive distillation, teacher and student at the same w."""

    def __init__(self, config: GuidedConfig, materials: Materials) -> None:
        before = materials.before()
        if before is None:
            raise StageError("there is no student to go on from")
        super().__init__(config, materials, before)

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor) -> Tensor:
        stochastic = self.config.sampler == "stochastic"
        return two_step_target(
            lambda z, j: self.teacher.x0(z, j, condition, w), z, i, self.teacher.grid, stochastic=stochastic
        )
