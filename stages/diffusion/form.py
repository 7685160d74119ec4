"""What a student is, as `student.json` beside it says. Imports no torch and no NumPy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Config
from stages.diffusion.prediction import StudentPrediction

Schedule = Literal["teacher", "cosine"]
StudentSampler = Literal["ddim", "stochastic", "consistency"]


class Form(Config):
    """How often a student is called, at which levels of noise, and what its outputs mean."""

    steps: int = Field(1, ge=1, description="calls of its network for one sample")
    prediction: StudentPrediction = Field("v_prediction", description="what its network puts out")
    schedule: Schedule = Field("teacher", description="the levels of noise: its teacher's, or alpha = cos(pi t / 2)")
    sampler: StudentSampler = Field("ddim", description="how it goes from one level to the next")
    guidance_scale: float | None = Field(
        None, description="of the teacher, built into the student, as diffusers counts it; null: those of its pairs"
    )
    w_range: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="the least and the greatest w = guidance_scale - 1 that it takes as an input; null: it takes none",
    )
