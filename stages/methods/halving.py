"""What methods have in common that halve a student's steps round by round: a chain of stages."""

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
from stages.methods.base import MethodConfig, Round, differences

MOST = 2**19
"""Steps to begin with: a link's name has six digits at most."""


class HalvingConfig(MethodConfig):
    """From `start_steps` to `end_steps`, halved in each round, whose student goes on from the one before."""

    DATA: ClassVar[tuple[Literal["pairs", "latents"], ...]] = ("latents", "pairs")
    start_steps: int = Field(32, ge=1, le=MOST, description="of the teacher's sampler: what the first round halves")
    match_first: Annotated[bool, Neutral()] = Field(
        False,
        description="begin with a link that halves nothing: its student learns the teacher's output as `prediction` in "
        "start_steps steps; needed where the teacher predicts epsilon; a chain with start_from has no such link",
    )
    end_steps: int = Field(1, ge=1, validate_default=True, description="of the last round's student")
    training_steps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="of single rounds, by their student's steps: {2: 4000, 1: 4000}; others: training.steps"
    )
    prediction: Literal["v_prediction", "sample", "both"] = Field(
        "v_prediction",
        description="what the student puts out: v, x0 (sample), or both x0 and the noise, which plain diffusers cannot "
        "sample",
    )
    schedule: Schedule = Field(
        "teacher",
        description="levels of noise: the teacher's own timesteps; or cosine, which ends in pure noise and has room "
        "for any number of steps",
    )
    weighting: Weighting = Field(
        "truncated_snr", description="of errors in x0 by the ratio of data to noise: itself, at least 1, or plus 1"
    )

    @classmethod
    def halvings(cls, start: int, end: int, matches_first: bool) -> list[tuple[int, int]]:
        """The steps of teacher and student in each round; none if halving `start` never gives `end`."""
        stations = [start]
        while stations[-1] > end and stations[-1] % 2 == 0:
            stations.append(stations[-1] // 2)
        if stations[-1] != end:
            return []
        return [(start, start)] * matches_first + list(pairwise(stations))

    @classmethod
    def rounds(cls, settings: Mapping[str, Any], goes_on: bool) -> list[Round]:
        defaults = {name: info.default for name, info in cls.model_fields.items()}
        wanted = ("start_steps", "end_steps", "match_first", "training_steps")
        start, end, matches, budgets = ({**defaults, **settings}[name] for name in wanted)
        if type(start) is not int or type(end) is not int or not 1 <= end <= start <= MOST:
            return []
        if type(matches) is not bool:
            return []
        if not isinstance(budgets, dict) or any(type(steps) is not int for steps in budgets.values()):
            return []
        found = cls.halvings(start, end, matches and not goes_on)
        if set(budgets) - {str(to) for _, to in found}:
            return []
        rest = {key: value for key, value in settings.items() if key not in ("training_steps", "match_first")}
        return [
            Round(
                to,
                {**rest, "start_steps": from_, "end_steps": to, **({"match_first": True} if from_ == to else {})},
                budgets.get(str(to)),
            )
            for from_, to in found
        ]

    @property
    def halves(self) -> bool:
        """Whether its student takes fewer steps than its teacher; if not, it learns something else in as many."""
        return self.end_steps < self.start_steps

    @property
    def form(self) -> Form:
        return Form(steps=self.end_steps, prediction=self.prediction, schedule=self.schedule)

    @field_validator("end_steps")
    @classmethod
    def _halves(cls, end: int, info: ValidationInfo) -> int:
        start = info.data.get("start_steps")
        matches_first = info.data.get("match_first", False)
        if start == end and not matches_first:
            raise ValueError("nothing is halved: give fewer end_steps, or match_first: true")
        if start is not None and not cls.halvings(start, end, matches_first):
            raise ValueError(f"should be what start_steps: {start} comes to by halving")
        return end

    @field_validator("training_steps")
    @classmethod
    def _of_rounds(cls, budgets: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        """Whoever has rounds to give them to was made several stages of before, each without."""
        start, end = (info.data.get(name) for name in ("start_steps", "end_steps"))
        if start is None or end is None:
            return budgets
        known = [str(to) for _, to in cls.halvings(start, end, info.data.get("match_first", False))]
        for steps in budgets:
            if steps not in known:
                wrong = PydanticCustomError("no_round", "there is no round to so many steps")
                error: InitErrorDetails = {"type": wrong, "loc": (steps,), "input": steps}
                raise ValidationError.from_exception_data("training_steps", [error])
        return budgets

    @model_validator(mode="after")
    def _counts_noise(self) -> Self:
        if self.weighting == "snr" and self.schedule == "cosine":
            raise ValueError("weighting: snr counts nothing in pure noise, where sampling begins")
        return self

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        """What is planned is a single round: of several, each was made a stage of its own."""
        for steps in self.training_steps:
            yield f"training_steps.{steps}", "no round comes to so many steps, going on from `start_from`; leave it out"
        if not self.training_steps and self.start_steps not in (self.end_steps, 2 * self.end_steps):
            yield "end_steps", f"a round halves start_steps: {self.start_steps}; {self.end_steps} is not half of it"
        if start is None:
            return
        if not self.halves:
            yield "start_steps", "a link that halves nothing learns from the teacher itself; leave start_from out"
        if start.form.steps != self.start_steps:
            yield "start_steps", f"the student to go on from takes {start.form.steps} steps"
        yield from differences(start.form, self.form, but=("steps",))

    def check_prediction(self, teacher: Prediction, begins: bool) -> Iterator[tuple[str, str]]:
        if teacher == "epsilon" and begins and self.halves:
            yield (
                "start_steps",
                f"the teacher predicts epsilon, and none of its steps can be halved before a student predicts "
                f"{self.prediction}: set match_first: true, which begins with a link that learns that in "
                f"{self.start_steps} steps",
            )

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        if self.schedule == "teacher" and self.start_steps > count:
            yield (
                "start_steps",
                f"{self.start_steps} are more than the teacher's {count} timesteps; try cosine",
            )
