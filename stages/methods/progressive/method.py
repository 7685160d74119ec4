from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.diffusion.halving import two_step_target
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.halving_loss import halving_loss
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
        condition = self.encode(batch["prompts"])

        def target(z: Tensor, i: Tensor, w: Tensor | None) -> Tensor:
            return two_step_target(lambda z, j: self.teacher.x0(z, j, condition), z, i, self.teacher.grid)

        return halving_loss(self.student, target, self.weighting, batch["latent"], condition)

    def after_step(self, step: int) -> None:
        pass
