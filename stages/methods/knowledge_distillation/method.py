from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stages.methods.base import Materials, OneStepPrediction
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.losses.config import Distance


class KnowledgeDistillation:
    """Luhman and Luhman 2021, 2101.02388, section 3: minimise d(F(x_T), T(x_T)) over stored pairs."""

    def __init__(self, distance: Distance, prediction: OneStepPrediction, materials: Materials) -> None:
        self.distance, self.teacher = distance, materials.teacher
        self.student = materials.one_step_student(prediction)
        self.teacher.retire()
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: noise and latent (B, C, H, W), prompts (B strings)."""
        x0 = self.student(batch["noise"], self.teacher.encode_prompts(batch["prompts"]))
        return self.distance(x0, batch["latent"]).mean(), {}

    def after_step(self, step: int) -> None:
        pass
