"""The base class of methods that halve the number of steps in each round. The rounds are a chain of stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from stages.base import Neutral
from stages.diffusion.form import Form, Schedule
from stages.diffusion.prediction import Prediction
from stages.diffusion.weighting import Weighting
from stages.methods.base import MethodConfig, Round, Stream, form_mismatches

MAX_STEPS = 2**19
"""The largest `start_steps`: a power of two with six digits, because the number in a link's name has at most six."""


class HalvingConfig(MethodConfig):
    """Base class of methods that halve the number of steps from `start_steps` to `end_steps`.

    Each round's student starts from the weights of its teacher. The teacher of the first round is the stage's diffusion
    teacher. The teacher of each later round is the student of the round before.
    """

    DATA: ClassVar[tuple[frozenset[Stream], ...]] = (frozenset({"latents"}), frozenset({"pairs"}))
    start_steps: int = Field(32, ge=1, le=MAX_STEPS, description="sampling steps of the teacher in the first round")
    match_first: Annotated[bool, Neutral()] = Field(
        False,
        description="whether the chain begins with a round that keeps the number of steps and only learns the "
        "prediction type `prediction`; needed if the teacher predicts epsilon; ignored with start_from",
    )
    end_steps: int = Field(1, ge=1, validate_default=True, description="steps of the last student")
    training_steps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="training steps of single rounds, by the number of steps of the round's student, such as {2: 4000, "
        "1: 4000}; other rounds use training.steps",
    )
    prediction: Literal["v_prediction", "sample", "flow_prediction", "both"] = Field(
        "v_prediction",
        description="what the student predicts: v, x0 (sample), noise - x0 (flow_prediction, for flow teachers), or "
        "both x0 and the noise, which plain diffusers cannot sample",
    )
    schedule: Schedule = Field(
        "teacher",
        description="noise levels; teacher: those of the teacher's timesteps; cosine: the cosine schedule, which ends "
        "in pure noise and allows any number of steps",
    )
    weighting: Weighting = Field(
        "truncated_snr",
        description="weight of squared errors of x0: snr (alpha^2 / sigma^2), truncated_snr (max(snr, 1)), or "
        "snr_plus_one (snr + 1)",
    )

    @classmethod
    def round_steps(cls, start: int, end: int, match_first: bool) -> list[tuple[int, int]]:
        """Return (teacher's steps, student's steps) of each round. Empty if `start` cannot be halved to `end`."""
        steps = [start]
        while steps[-1] > end and steps[-1] % 2 == 0:
            steps.append(steps[-1] // 2)
        if steps[-1] != end:
            return []
        return [(start, start)] * match_first + list(pairwise(steps))

    @classmethod
    def rounds(cls, settings: Mapping[str, Any], has_start: bool) -> list[Round]:
        defaults = {name: info.default for name, info in cls.model_fields.items()}
        wanted = ("start_steps", "end_steps", "match_first", "training_steps")
        start, end, matches, budgets = ({**defaults, **settings}[name] for name in wanted)
        if type(start) is not int or type(end) is not int or not 1 <= end <= start <= MAX_STEPS:
            return []
        if type(matches) is not bool:
            return []
        if not isinstance(budgets, dict) or any(type(steps) is not int for steps in budgets.values()):
            return []
        found = cls.round_steps(start, end, matches and not has_start)
        if set(budgets) - {str(after) for _, after in found}:
            return []
        rest = {key: value for key, value in settings.items() if key not in ("training_steps", "match_first")}
        return [
            Round(
                after,
                {
                    **rest,
                    "start_steps": before,
                    "end_steps": after,
                    **({"match_first": True} if before == after else {}),
                },
                budgets.get(str(after)),
            )
            for before, after in found
        ]

    @property
    def halves(self) -> bool:
        """Whether the student takes fewer steps than its teacher. The first link of a `match_first` chain does not."""
        return self.end_steps < self.start_steps

    @property
    def form(self) -> Form:
        return Form(steps=self.end_steps, prediction=self.prediction, schedule=self.schedule)

    @field_validator("end_steps")
    @classmethod
    def _end_is_reached(cls, end: int, info: ValidationInfo) -> int:
        start = info.data.get("start_steps")
        match_first = info.data.get("match_first", False)
        if start == end and not match_first:
            raise ValueError("nothing is halved: give fewer end_steps, or match_first: true")
        if start is not None and not cls.round_steps(start, end, match_first):
            raise ValueError(f"should be start_steps: {start} halved one or more times")
        return end

    @field_validator("training_steps")
    @classmethod
    def _keys_are_rounds(cls, budgets: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        """Check that each key is the number of steps of a round. The links of a chain have no `training_steps`."""
        start, end = (info.data.get(name) for name in ("start_steps", "end_steps"))
        if start is None or end is None:
            return budgets
        known = [str(after) for _, after in cls.round_steps(start, end, info.data.get("match_first", False))]
        for steps in budgets:
            if steps not in known:
                wrong = PydanticCustomError("no_round", "should be the number of steps of a round")
                error: InitErrorDetails = {"type": wrong, "loc": (steps,), "input": steps}
                raise ValidationError.from_exception_data("training_steps", [error])
        return budgets

    @model_validator(mode="after")
    def _weight_is_positive(self) -> Self:
        if self.weighting == "snr" and self.schedule == "cosine":
            raise ValueError("weighting: snr is 0 in pure noise, where a cosine schedule ends")
        return self

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        """Check the settings of a single round. Settings of several rounds have already been split into links."""
        for steps in self.training_steps:
            yield f"training_steps.{steps}", "no round has this number of steps if start_from is set; leave it out"
        if not self.training_steps and self.start_steps not in (self.end_steps, 2 * self.end_steps):
            yield "end_steps", f"{self.end_steps} is not half of start_steps: {self.start_steps}"
        if start is None:
            return
        if not self.halves:
            yield "start_steps", "a link that keeps the number of steps learns from the teacher; leave start_from out"
        if start.form.steps != self.start_steps:
            yield "start_steps", f"the student in start_from takes {start.form.steps} steps"
        yield from form_mismatches(start.form, self.form, ignore=("steps",))

    def check_prediction(self, teacher: Prediction, from_teacher: bool) -> Iterator[tuple[str, str]]:
        if from_teacher and self.halves and teacher in ("epsilon", "flow_prediction") and teacher != self.prediction:
            keep = "prediction: flow_prediction, or " if teacher == "flow_prediction" else ""
            yield (
                "start_steps",
                f"the network that training starts from predicts {teacher}, so its steps cannot be halved directly; "
                f"set {keep}match_first: true, so that the first link learns to predict {self.prediction} in "
                f"{self.start_steps} steps",
            )

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        if self.schedule == "teacher" and self.start_steps > count:
            yield (
                "start_steps",
                f"{self.start_steps} are more than the teacher's {count} timesteps; try schedule: cosine",
            )
