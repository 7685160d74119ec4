"""`kind: evaluate`: a student beside its teacher, on the same prompts and noise, as JSON and as one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Input, Stage, StageContext
from stages.pairs import Pairs


class Evaluate(Stage):
    """`real: digits` measures against real images through a probe trained on them. Without it only what needs
    no real images is measured: distance to the teacher's own output, seconds and network calls."""

    VERSION: ClassVar[int] = 1
    kind: Literal["evaluate"]
    student: Annotated[str, Input("distill")]
    real: Literal["digits"] | None = None
    samples: int = Field(2000, ge=20, description="of each side; held-out pairs first, then fresh noise")
    teacher_steps: list[Annotated[int, Field(ge=1)]] = Field([4, 2, 1], description="also sample the teacher in these")

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        pairs = inputs["student"].inputs["pairs"].stage
        assert isinstance(pairs, Pairs)
        if self.real == "digits" and pairs.prompts != "digits":
            yield "real", f"prompt accuracy on digits needs pairs with prompts: digits, not {pairs.prompts!r}"
        too_many = [steps for steps in self.teacher_steps if steps > pairs.sampler.steps]
        if too_many:
            yield "teacher_steps", f"{too_many[0]} is more than the {pairs.sampler.steps} steps of the pairs themselves"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        from stages.evaluation import evaluate

        return context.run(
            evaluate,
            context.inputs["student"],
            self.samples,
            self.teacher_steps,
            self.real,
            self.execution,
            context.output,
            context.threads,
        )
