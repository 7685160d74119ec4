"""Knowledge distillation: a one-step student trained by regression on stored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stages.methods.base import Materials, OneStepPrediction
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.losses.config import Distance


class KnowledgeDistillation:
    """Minimises E[d(G(z, c), x)] over stored pairs of noise z and latent x = T(z, c) (2101.02388, section 3).

    If the guidance scales of the pairs differ, w is an input of G and T, too."""

    def __init__(self, distance: Distance, prediction: OneStepPrediction, materials: Materials) -> None:
        self.distance = distance
        self.student = materials.one_step_student(prediction)
        materials.teacher.release()
        self.players = {"student": Player(self.student, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar. `batch`: pairs."""
        pairs = batch["pairs"]
        x0 = self.student(pairs["noise"], self.student.encode(pairs["prompts"]), pairs["w"])
        return self.distance(x0, pairs["latent"]).mean(), {}

    def after_step(self, step: int) -> None:
        pass
