from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.diffusion.form import Form
from stages.methods.base import Materials
from stages.methods.halving import HalvingConfig
from stages.training import Method


class ProgressiveConfig(HalvingConfig):
    """Progressive distillation (Salimans and Ho 2022, 2202.00512): a student learns to do two DDIM steps of its teacher
    in one step, and then becomes the teacher of the next student.

    A stage `student` from 32 steps to 1 is a chain of stages, student/16 to student/1, each with a new optimizer. At
    the last point of the time grid students are trained on pure noise, as sampling starts from it, even if the
    schedule's last alpha is above 0. The paper trains without averaged weights: `training.ema_decay: 0`.

    Students predict v, x0 or both, because epsilon with truncated SNR diverges (table 1). A teacher that predicts
    epsilon needs `match_first: true`. The first link, student/32, then learns to predict v in as many steps as its
    teacher.
    """

    name: Literal["progressive"] = "progressive"
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="the teacher's guidance scale that is built into the student, as in diffusers; 1 means no "
        "guidance; default: the scale of the pairs",
    )

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"guidance_scale": self.guidance_scale})

    def create(self, materials: Materials) -> Method:
        from stages.methods.progressive.method import Progressive

        return Progressive(self, materials)
