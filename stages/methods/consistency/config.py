from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Artifact, Choice, values_under
from stages.diffusion.form import Form, WRange
from stages.diffusion.prediction import Prediction
from stages.losses.config import LOSSES, LossConfig, Regression
from stages.methods.base import Materials, MethodConfig, differences
from stages.training import Method


class ConsistencyConfig(MethodConfig):
    """Consistency distillation (Song et al. 2023, 2303.01469), and its latent, guided form, LCM (Luo et al. 2023,
    2310.04378): wherever on the teacher's ODE it is called, the student is to name the same end.

    Neighbouring points are one step of `solver_steps` apart: at 40 of 1,000 timesteps, 25 are skipped. `w_range` makes
    the student take the strength of guidance as an input, as LCM does; otherwise `guidance_scale` is built in.
    """

    DATA: ClassVar[tuple[Literal["pairs", "latents"], ...]] = ("latents", "pairs")
    VERSION: ClassVar[int] = 2
    name: Literal["consistency"] = "consistency"
    steps: int = Field(
        4,
        ge=1,
        description="in which the student is sampled if nothing else is said, and for which it is exported; no part of "
        "the training: `steps` of an evaluate stage, or of retort sample, tries others",
    )
    solver_steps: int = Field(40, ge=2, description="of the teacher's DDIM, which skips timesteps; a multiple of steps")
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="of the teacher, built into the student, as diffusers counts it: 1 is none; default: that of the "
        "pairs",
    )
    w_range: WRange | None = Field(
        None, description="instead: the least and the greatest w = guidance_scale - 1 as an input"
    )
    target_decay: float = Field(
        0.95, ge=0, lt=1, description="of the averaged weights whose output is the target; 0: the student's own"
    )
    loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(
        Regression(name="pseudo_huber"), description="the distance of the two outputs"
    )
    prediction: Prediction | None = Field(
        None,
        description="what the student's U-Net puts out: the noise (epsilon), v, or x0 (sample); default: what the "
        "teacher's does, whose weights then mean what they did",
    )

    @property
    def form(self) -> Form:
        return Form(
            steps=self.steps,
            prediction=self.prediction,
            sampler="consistency",
            guidance_scale=self.guidance_scale,
            w_range=self.w_range,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.solver_steps % self.steps:
            raise ValueError(f"solver_steps: {self.solver_steps} is no multiple of steps: {self.steps}")
        if self.w_range and self.guidance_scale:
            raise ValueError("give either guidance_scale or w_range")
        return self

    def why_not_in(self, steps: int) -> str | None:
        found = self.solver_steps % steps
        return f"the student was trained at {self.solver_steps} points, no multiple of {steps} steps" if found else None

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        if start is not None:
            yield from differences(start.form, self.form, but=("steps",))  # of which its weights know nothing

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(values_under(inputs, "loss")))

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        if self.solver_steps > count:
            yield "solver_steps", f"{self.solver_steps} are more than the teacher's {count} timesteps"

    def check_prediction(self, teacher: Prediction, begins: bool) -> Iterator[tuple[str, str]]:
        if begins and self.prediction == "epsilon" != teacher:
            yield (
                "prediction",
                f"the teacher predicts {teacher}; its student would begin with a last layer of zeros, which says "
                "nothing of epsilon. Leave prediction out: the student then predicts what its teacher does",
            )

    def create(self, materials: Materials) -> Method:
        from stages.methods.consistency.method import Consistency

        return Consistency(self, materials)
