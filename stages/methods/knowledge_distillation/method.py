from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.losses.regression import regression_loss
from stages.methods.base import Batch, Materials, Player, Turn
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.networks.student import OneStepStudent


class KnowledgeDistillation:
    """Luhman and Luhman 2021, 2101.02388, section 3: minimise d(F(x_T), T(x_T)) over stored pairs."""

    def __init__(self, config: KnowledgeDistillationConfig, materials: Materials) -> None:
        self.config = config
        self.teacher = materials.teacher
        self.student = OneStepStudent.from_teacher(materials.teacher, materials.timesteps[0], config.prediction)
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: noise and latent (B, C, H, W), prompts (B strings)."""
        x0 = self.student(batch["noise"], self.teacher.encode_prompts(batch["prompts"]))
        return regression_loss(self.config.loss, x0, batch["latent"]), {}

    def after_step(self, step: int) -> None:
        pass
