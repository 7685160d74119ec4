from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.base import Choice
from stages.losses.config import LOSSES, LossConfig, Regression
from stages.methods.base import Materials, OneStepConfig
from stages.training import Method


class KnowledgeDistillationConfig(OneStepConfig):
    """One-step knowledge distillation (Luhman and Luhman 2021, 2101.02388): regression on the teacher's ODE map.

    The paper sums the loss over pixels, with L1 for CIFAR-10 and L2 elsewhere. Retort averages the loss, so that one
    learning rate suits several resolutions. The paper's student computes x_T - net(x_T). Retort's student predicts v by
    default, because x0 = (z - sigma epsilon) / alpha multiplies errors of epsilon by sigma / alpha: by 14.6 at Stable
    Diffusion's t = 999.
    """

    VERSION: ClassVar[int] = 2
    LEARNS_RANGE: ClassVar[bool] = True
    name: Literal["knowledge_distillation"] = "knowledge_distillation"
    loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(
        Regression(name="l1"), description="distance between the student's output and the teacher's"
    )

    def create(self, materials: Materials) -> Method:
        from stages.methods.knowledge_distillation.method import KnowledgeDistillation

        return KnowledgeDistillation(materials.distance(self.loss), self.prediction, materials)
