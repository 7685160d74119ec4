"""`kind: distill`: train a student on sealed pairs with one of the methods, and export it for plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stages.base import SCRATCH, Artifact, Choice, Config, Input, Neutral, Stage, StageContext, below
from stages.data.shares import BLOCK
from stages.methods import METHODS
from stages.methods.base import MethodConfig, OneStepConfig, TrainingExecution, TrainingSettings, training_progress
from stages.pairs import Pairs


class Source(Config):
    """Pairs to train on, and their share of every batch."""

    pairs: Annotated[str, Input("pairs")] = Field(description="where they come from")
    weight: float | None = Field(
        None, gt=0, description="relative to the others'; default: each by its number of pairs"
    )


def _sources(value: Any) -> Any:
    """A stage's name stands for a list of one, and in a list for a source of default weight."""
    values = [value] if isinstance(value, str) else value
    return [{"pairs": one} if isinstance(one, str) else one for one in values] if isinstance(values, list) else values


def sources(student: Mapping[str, Artifact]) -> list[Artifact]:
    """The `pairs` artifacts among a student's inputs, in the manifest's order."""
    return [artifact for field, artifact in student.items() if field.startswith("pairs.")]


class Distill(Stage):
    """Train a student on sealed pairs with one of the methods, and export it as a stock diffusers folder.

    `pairs` is one stage, or a list of `{pairs: STAGE, weight: 2.0}` to be mixed.
    """

    VERSION: ClassVar[int] = 2
    kind: Literal["distill"]
    pairs: Annotated[list[Source], BeforeValidator(_sources)] = Field(
        min_length=1, description="what it is trained on: a stage, or a list of several and their weights"
    )
    method: Annotated[MethodConfig, Choice("name", METHODS)] = Field(description="how the student is taught")
    start_from: Annotated[str | None, Input("distill"), Neutral()] = Field(
        None, description="a student of the same teacher to go on from; default: the teacher's own weights"
    )
    training: TrainingSettings = Field(description="how the student is optimised")
    held_out: int = Field(
        256, ge=1, description="the first source's last pairs, never trained on: for held-out loss and evaluation"
    )
    execution: TrainingExecution = Field(TrainingExecution(), description="how it is carried out; makes nothing stale")

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
        if len({artifact.seed for artifact in found}) < len(found):
            yield (
                "pairs",
                "two of them have one seed, and so start from the same noises: what is held out of one would be "
                "trained on in the other; give one stage a `seed:` of its own",
            )
        weights = [source.weight or stage.count for source, stage in zip(self.pairs, stages, strict=True)]
        light = next((s.pairs for s, w in zip(self.pairs, weights, strict=True) if w < sum(weights) / BLOCK), None)
        if light is not None:
            yield "pairs", f"{light} has less than 1/{BLOCK} of the weight and would never be drawn"
        yield from ((f"method.{path}", problem) for path, problem in self.method.check(below(inputs, "method")))
        teacher = found[0].inputs["teacher"]
        if getattr(teacher.stage, "gaussian", None):
            yield "pairs", "their teacher is `gaussian:`, which has no network that a student could start from"
        if "start_from" in inputs:
            yield from self._check_start(inputs["start_from"], teacher)

    def _check_start(self, start: Artifact, teacher: Artifact) -> Iterator[tuple[str, str]]:
        assert isinstance(start.stage, Distill)
        if sources(start.inputs)[0].inputs["teacher"].fingerprint != teacher.fingerprint:
            yield "start_from", f"{self.start_from} is the student of another teacher than that of `pairs`"
        of, own = start.stage.method, self.method
        if isinstance(of, OneStepConfig) and isinstance(own, OneStepConfig) and of.prediction != own.prediction:
            yield "start_from", f"{self.start_from} puts out {of.prediction}; set method.prediction: {of.prediction}"

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        if len({source.weight is None for source in self.pairs}) > 1:
            raise ValueError("give each of the pairs a weight, or none of them")
        return self

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
            below(context.inputs, "method"),
            below(context.contents, "method"),
            context.inputs.get("start_from"),
            context.seed,
            context.output,
            context.threads,
            context.fingerprint,
        )


def _distill(*arguments: Any) -> Any:
    from stages.distillation import distill

    return distill(*arguments)
