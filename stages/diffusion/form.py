"""What a student is, as `student.json` beside it says. Imports no torch and no NumPy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from stages.base import Config
from stages.diffusion.prediction import StudentPrediction

Schedule = Literal["teacher", "cosine"]
StudentSampler = Literal["ddim", "stochastic", "consistency"]


def _a_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1]:
        raise ValueError("w_range is to be two numbers, the first at least 0 and less than the second")
    return value


WRange = Annotated[tuple[float, float], Strict(False), AfterValidator(_a_range)]
"""The least and the greatest w = guidance_scale - 1 that a student takes as an input."""


class Form(Config):
    """How often a student is called, at which levels of noise, and what its outputs mean."""

    steps: int = Field(1, ge=1, description="calls of its network for one sample")
    prediction: StudentPrediction | None = Field(
        "v_prediction", description="what its network puts out; null, of a method: what its teacher's does"
    )
    schedule: Schedule = Field("teacher", description="the levels of noise: its teacher's, or alpha = cos(pi t / 2)")
    sampler: StudentSampler = Field("ddim", description="how it goes from one level to the next")
    guidance_scale: float | None = Field(
        None,
        description="of the teacher, built into the student, as diffusers counts it; null: w_range instead, or, of a "
        "method, that of its pairs",
    )
    w_range: WRange | None = Field(
        None,
        description="the least and the greatest w = guidance_scale - 1 that it takes as an input; null: it takes none",
    )

    @model_validator(mode="after")
    def _defined_in_pure_noise(self) -> Self:
        if self.prediction == "epsilon" and self.schedule == "cosine":
            raise ValueError("schedule: cosine begins in pure noise, where epsilon says nothing of x0")
        return self
