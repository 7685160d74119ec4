"""`kind: distill`: train a student on sealed pairs with one of the methods, and export it for plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Input, Stage, StageContext
from stages.methods import METHODS
from stages.methods.base import MethodConfig, TrainingExecution, TrainingSettings, training_progress
from stages.pairs import Pairs


class Distill(Stage):
    VERSION: ClassVar[int] = 1
    kind: Literal["distill"]
    pairs: Annotated[str, Input("pairs")]
    method: Annotated[MethodConfig, Choice("name", METHODS)]
    training: TrainingSettings
    held_out: int = Field(
        256, ge=1, description="the last pairs, never trained on: for the held-out loss and evaluation"
    )
    execution: TrainingExecution = TrainingExecution()

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        pairs = inputs["pairs"].stage
        assert isinstance(pairs, Pairs)
        if self.held_out >= pairs.count:
            yield "held_out", f"{self.held_out} pairs held out of {pairs.count} leave none to train on"
        if pairs.sampler.timestep_spacing != "trailing":
            yield (
                "pairs",
                "a one-step student needs pairs solved with timestep_spacing: trailing, from the last timestep",
            )
        teacher = inputs["pairs"].inputs["teacher"].stage
        if getattr(teacher, "gaussian", None):
            yield "pairs", "their teacher is `gaussian:`, which has no network that a student could start from"

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(
            _distill,
            self.method,
            self.training,
            self.held_out,
            self.execution,
            context.inputs["pairs"],
            context.seed,
            context.output,
            context.threads,
            context.fingerprint,
        )


def _distill(*arguments: Any) -> Any:
    from stages.distillation import distill

    return distill(*arguments)
