from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.diffusion.form import Form
from stages.methods.base import Materials
from stages.methods.halving import HalvingConfig
from stages.training import Method


class ProgressiveConfig(HalvingConfig):
    """Progressive distillation (Salimans and Ho 2022, 2202.00512): a student learns to do in one DDIM step what its
    teacher does in two, then becomes the teacher.

    A stage `student` from 32 steps to 1 is a chain of stages, student/16 to student/1, each with its own optimizer.
    At the noisiest point it is trained on pure noise, on which sampling begins, whatever the schedule ends in. The
    paper trains without averaged weights: `training.ema_decay: 0`.

    Students predict v, x0 or both: epsilon with truncated SNR diverges (the paper's table 1). A teacher that predicts
    epsilon needs `match_first: true`: the first link, student/32, takes as many steps as its teacher and learns to put
    out v in place of epsilon.
    """

    name: Literal["progressive"] = "progressive"
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="of the teacher, built into the student, as diffusers counts it: 1 is none; default: that of the "
        "pairs",
    )

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"guidance_scale": self.guidance_scale})

    def create(self, materials: Materials) -> Method:
        from stages.methods.progressive.method import Progressive

        return Progressive(self, materials)
