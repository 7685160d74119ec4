"""`kind: distill`: train a student on sealed pairs with one of the methods, and export it for plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stages.base import SCRATCH, Artifact, Choice, Config, Input, Stage, StageContext
from stages.methods import METHODS
from stages.methods.base import MethodConfig, TrainingExecution, TrainingSettings, training_progress
from stages.pairs import Pairs


class Source(Config):
    """Pairs to train on, and their share of every batch."""

    pairs: Annotated[str, Input("pairs")]
    weight: float | None = Field(None, gt=0, description="relative to the others'; default: the number of pairs")


def _one_source(value: Any) -> Any:
    return [{"pairs": value}] if isinstance(value, str) else value


def sources(student: Mapping[str, Artifact]) -> list[Artifact]:
    """The `pairs` artifacts among a student's inputs, in the manifest's order."""
    return [artifact for field, artifact in student.items() if field.startswith("pairs.")]


class Distill(Stage):
    """`pairs` is one stage, or a list of `{pairs: STAGE, weight: 2.0}` to be mixed."""

    VERSION: ClassVar[int] = 2
    kind: Literal["distill"]
    pairs: Annotated[list[Source], BeforeValidator(_one_source)] = Field(min_length=1)
    method: Annotated[MethodConfig, Choice("name", METHODS)]
    training: TrainingSettings
    held_out: int = Field(
        256, ge=1, description="the first source's last pairs, never trained on: for held-out loss and evaluation"
    )
    execution: TrainingExecution = TrainingExecution()

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        found = sources(inputs)
        stages = [artifact.stage for artifact in found if isinstance(artifact.stage, Pairs)]
        if self.held_out >= stages[0].count:
            yield "held_out", f"{self.held_out} pairs held out of {stages[0].count} leave none to train on"
        if any(stage.sampler.timestep_spacing != "trailing" for stage in stages):
            yield (
                "pairs",
                "a one-step student needs pairs solved with timestep_spacing: trailing, from the last timestep",
            )
        if len({artifact.inputs["teacher"].fingerprint for artifact in found}) > 1:
            yield "pairs", "they are of several teachers; a student has one"
        if getattr(found[0].inputs["teacher"].stage, "gaussian", None):
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
            sources(context.inputs),
            [source.weight for source in self.pairs],
            context.seed,
            context.output,
            context.threads,
            context.fingerprint,
        )


def _distill(*arguments: Any) -> Any:
    from stages.distillation import distill

    return distill(*arguments)
