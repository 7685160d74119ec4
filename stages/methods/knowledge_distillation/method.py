from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stages.methods.base import Materials, OneStepPrediction
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.losses.config import Distance


class KnowledgeDistillation:
    """Minimises E[d(G(z, c), x)] over stored pairs of noise z and latent x = T(z, c) (2101.02388, section 3)."""

    def __init__(self, distance: Distance, prediction: OneStepPrediction, materials: Materials) -> None:
        self.distance, self.teacher = distance, materials.teacher
        self.student = materials.one_step_student(prediction)
        self.teacher.retire()
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar. `batch`: noise and latent (B, C, H, W), prompts (B strings)."""
        x0 = self.student(batch["noise"], self.teacher.encode_prompts(batch["prompts"]))
        return self.distance(x0, batch["latent"]).mean(), {}

    def after_step(self, step: int) -> None:
        pass
