from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.losses.regression import RegressionLoss
from stages.methods.base import Materials, Method, MethodConfig


class KnowledgeDistillationConfig(MethodConfig):
    """One-step knowledge distillation (Luhman and Luhman 2021, 2101.02388): regress the teacher's ODE map.

    The paper sums the loss over pixels, L1 for CIFAR-10 and L2 elsewhere; here it is averaged, so that a
    learning rate carries over between resolutions. The paper's student is `x_T - net(x_T)`; ours predicts
    v by default: an epsilon student's errors are multiplied by sigma/alpha, 14.6 at Stable Diffusion's t = 999.
    """

    name: Literal["knowledge_distillation"] = "knowledge_distillation"
    loss: RegressionLoss = Field(
        "l1",
        description="of the student's output to the teacher's: absolute, squared, or pseudo-Huber difference (between "
        "the two: large errors count linearly), averaged over elements",
    )
    prediction: Literal["v_prediction", "epsilon"] = Field(
        "v_prediction", description="what the student's U-Net puts out; v is well-behaved at the noisiest timestep"
    )

    def create(self, materials: Materials) -> Method:
        from stages.methods.knowledge_distillation.method import KnowledgeDistillation

        return KnowledgeDistillation(self.loss, self.prediction, materials)
