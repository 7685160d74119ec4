from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Artifact, Choice, values_under
from stages.diffusion.form import Form, WRange
from stages.diffusion.prediction import Prediction
from stages.losses.config import LOSSES, LossConfig, Regression
from stages.methods.base import Materials, MethodConfig, Stream, form_mismatches
from stages.training import Method


class ConsistencyConfig(MethodConfig):
    """Consistency distillation (Song et al. 2023, 2303.01469) and latent consistency models (LCM, Luo et al. 2023,
    2310.04378). The student learns to predict the end of the teacher's ODE path from every point of the path.

    The student is trained at `solver_steps` evenly spaced points. One DDIM step of the teacher leads from each point to
    the next. If there are 40 points and 1,000 timesteps, the step is 25 timesteps long. If `w_range` is set, the
    student takes the guidance strength w as an input, as in LCM. Otherwise it learns one scale, `guidance_scale`.
    """

    DATA: ClassVar[tuple[frozenset[Stream], ...]] = (frozenset({"latents"}), frozenset({"pairs"}))
    VERSION: ClassVar[int] = 2
    name: Literal["consistency"] = "consistency"
    steps: int = Field(
        4,
        ge=1,
        description="number of sampling steps of the exported pipeline; it does not affect training; `steps` of an "
        "evaluate stage and --steps of retort sample override it",
    )
    solver_steps: int = Field(
        40,
        ge=2,
        description="number of points of the ODE path, one DDIM step of the teacher apart; a multiple of steps",
    )
    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="guidance scale at which the student imitates the teacher, in diffusers' convention; 1 means no "
        "guidance; default: the scale of the pairs",
    )
    w_range: WRange | None = Field(
        None,
        description="range of w = guidance_scale - 1; the student then takes w as an input; excludes guidance_scale",
    )
    target_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="decay of the EMA of the student's weights, which computes the target; 0 uses the current weights",
    )
    loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(
        Regression(name="pseudo_huber"), description="distance between the student's output and the target"
    )
    prediction: Prediction | None = Field(
        None,
        description="what the student predicts: the noise (epsilon), v, or x0 (sample); default: the same as the "
        "teacher, so that the teacher's last layer can be reused",
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
            raise ValueError(f"solver_steps: {self.solver_steps} is not a multiple of steps: {self.steps}")
        if self.w_range and self.guidance_scale:
            raise ValueError("give either guidance_scale or w_range")
        return self

    def step_count_error(self, steps: int) -> str | None:
        if self.solver_steps % steps == 0:
            return None
        return f"the student was trained at {self.solver_steps} points, which is not a multiple of {steps} steps"

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        if start is not None:
            yield from form_mismatches(start.form, self.form, ignore=("steps",))  # weights do not depend on steps

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(values_under(inputs, "loss")))

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        if self.solver_steps > count:
            yield "solver_steps", f"{self.solver_steps} are more than the teacher's {count} timesteps"

    def check_prediction(self, teacher: Prediction, from_teacher: bool) -> Iterator[tuple[str, str]]:
        if from_teacher and self.prediction == "epsilon" != teacher:
            yield (
                "prediction",
                f"the network that training starts from predicts {teacher}, and its last layer cannot be converted to "
                f"epsilon; leave prediction out, so that the student predicts {teacher} too",
            )

    def create(self, materials: Materials) -> Method:
        from stages.methods.consistency.method import Consistency

        return Consistency(self, materials)
