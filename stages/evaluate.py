"""`kind: evaluate`: a student beside its teacher, on the same prompts and noise, as JSON and as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Input, Stage, StageContext
from stages.pairs import Pairs

MIN_SAMPLES = 100
"""More than the probe has features, or covariances are singular."""


class Evaluate(Stage):
    """`real: digits` measures against real images through a probe trained on them. Without it only what needs
    no real images is measured: distance to the teacher's own output, seconds and network calls."""

    VERSION: ClassVar[int] = 1
    kind: Literal["evaluate"]
    student: Annotated[str, Input("distill")]
    real: Literal["digits"] | None = None
    samples: int = Field(2000, ge=20, description="of each side; held-out pairs first, then fresh noise")
    teacher_steps: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="also sample the teacher in these; default: 4, 2 and 1, where the pairs took more"
    )

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        pairs = inputs["student"].inputs["pairs"].stage
        assert isinstance(pairs, Pairs)
        if self.real == "digits" and pairs.prompts != "digits":
            yield "real", f"prompt accuracy on digits needs pairs with prompts: digits, not {pairs.prompts!r}"
        steps = self.teacher_steps or []
        if len(set(steps)) < len(steps):
            yield "teacher_steps", "a number of steps is given twice"
        if steps and max(steps) >= pairs.sampler.steps:
            yield (
                "teacher_steps",
                f"{max(steps)} is not fewer than the {pairs.sampler.steps} steps of the pairs themselves",
            )
        if self.real and self.samples < MIN_SAMPLES:
            yield "samples", f"distances to real images need at least {MIN_SAMPLES} samples"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        from stages.evaluation import evaluate

        pairs = context.inputs["student"].inputs["pairs"].stage
        assert isinstance(pairs, Pairs)
        return context.run(
            evaluate,
            context.inputs["student"],
            self.samples,
            self.teacher_steps if self.teacher_steps is not None else [n for n in (4, 2, 1) if n < pairs.sampler.steps],
            self.real,
            self.execution,
            context.output,
            context.threads,
        )
