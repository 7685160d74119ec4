from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.diffusion.form import Form
from stages.methods.base import Materials
from stages.methods.halving import HalvingConfig
from stages.training import Method


class ProgressiveConfig(HalvingConfig):
    """Progressive distillation (Salimans and Ho 2022, 2202.00512): one step of a student replaces two DDIM steps of its
    teacher. The student is then the teacher of the next student.

    A stage `student` with `start_steps: 32` and `end_steps: 1` is a chain of stages, student/16 to student/1, each with
    a new optimizer. Students are trained on pure noise at the noisiest point, even if the schedule's last alpha is
    above 0, because sampling starts from pure noise. The paper does not average the weights, as with
    `training.ema_decay: 0`.

    Students predict v, x0, or both x0 and the noise, because epsilon with truncated SNR diverges (table 1). A teacher
    that predicts epsilon needs `match_first: true`. The chain then begins with student/32, which learns to predict v
    with as many steps as its teacher.
    """

    name: Literal["progressive"] = "progressive"
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="guidance scale at which the student imitates the teacher, in diffusers' convention; 1 means no "
        "guidance; default: the scale of the pairs",
    )

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"guidance_scale": self.guidance_scale})

    def create(self, materials: Materials) -> Method:
        from stages.methods.progressive.method import Progressive

        return Progressive(self, materials)
