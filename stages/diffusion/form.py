"""How a student is sampled, as stored in its `student.json`. Imports neither torch nor NumPy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from stages.base import Config
from stages.diffusion.config import Scale
from stages.diffusion.prediction import StudentPrediction

Schedule = Literal["teacher", "cosine"]
StudentSampler = Literal["ddim", "stochastic", "consistency"]
Boundary = Literal["none", "lcm"]


def _valid_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1]:
        raise ValueError("w_range should be two numbers: the first at least 0, the second greater than the first")
    return value


WRange = Annotated[tuple[float, float], Strict(False), AfterValidator(_valid_range)]
"""[w_min, w_max]: the range of w = guidance_scale - 1 that a student takes as an input."""


class Form(Config):
    """How a student is sampled: its number of steps, noise levels, prediction type, sampler and guidance.

    In the form of a method, `prediction` and `guidance_scale` may be None. The form of the trained student then has the
    prediction type of the teacher and the guidance scale of the pairs.
    """

    steps: int = Field(1, ge=1, description="network calls for one sample")
    prediction: StudentPrediction | None = Field(
        "v_prediction", description="what the network predicts; null, in a method's form: the same as its teacher"
    )
    schedule: Schedule = Field(
        "teacher", description="noise levels: those of the teacher, or cosine, alpha = cos(pi t / 2) (2202.00512)"
    )
    levels: tuple[int, ...] | None = Field(
        None,
        strict=False,
        description="timesteps of the teacher's schedule at which the network is called, descending, such as [999, "
        "749, 499, 249]; null: evenly spaced",
    )
    sampler: StudentSampler = Field(
        "ddim", description="how a step is taken: ddim, stochastic (2210.03142) or consistency (2303.01469)"
    )
    boundary: Boundary = Field(
        default_factory=lambda others: "lcm" if others.get("sampler") == "consistency" else "none",
        description="lcm: the output is mixed with the input, so that the student is the identity on clean data "
        "(2310.04378); default: lcm for the consistency sampler, none for others",
    )
    guidance_scale: float | None = Field(
        None,
        description="guidance scale that the student has learned, in diffusers' convention; null: the student takes w "
        "as an input; in a method's form, null means the scale of the pairs",
    )
    w_range: WRange | None = Field(
        None, description="range of w = guidance_scale - 1 that the student takes as an input; null: it takes no w"
    )

    @property
    def scale(self) -> Scale | None:
        """The guidance scale that the student has learned, or the range of scales that it takes as an input. In a
        method's form, None means that of the pairs."""
        return (1 + self.w_range[0], 1 + self.w_range[1]) if self.w_range else self.guidance_scale

    @model_validator(mode="after")
    def _predicts_x0_in_pure_noise(self) -> Self:
        if self.prediction == "epsilon" and self.schedule == "cosine":
            raise ValueError("schedule: cosine ends in pure noise, where x0 cannot be computed from epsilon")
        return self

    @model_validator(mode="after")
    def _levels_are_steps(self) -> Self:
        if self.levels is None:
            return self
        if self.schedule != "teacher":
            raise ValueError("levels are timesteps of the teacher's schedule: leave schedule out")
        if len(self.levels) != self.steps:
            raise ValueError(f"steps: {self.steps} needs {self.steps} levels, not {len(self.levels)}")
        if list(self.levels) != sorted(set(self.levels), reverse=True) or self.levels[-1] < 0:
            raise ValueError("levels should descend and be at least 0")
        return self
