from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.diffusion.halving import two_step_target
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.guided.config import GuidedConfig
from stages.methods.halving_loss import halving_loss


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
        condition, stochastic = self.encode(batch["prompts"]), self.config.sampler == "stochastic"

        def target(z: Tensor, i: Tensor, w: Tensor | None) -> Tensor:
            def denoise(z: Tensor, j: Tensor) -> Tensor:
                return self.teacher.x0(z, j, condition, w)

            if self.config.learns_guidance:
                return denoise(z, i).double()
            return two_step_target(denoise, z, i, self.teacher.grid, stochastic)

        return halving_loss(self.student, target, self.config.weighting, batch["latent"], condition)

    def after_step(self, step: int) -> None:
        pass
