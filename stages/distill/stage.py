"""`kind: distill`: trains a student with one of the methods and exports it for plain diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stages.base import SCRATCH, Artifact, Choice, Config, Input, Link, Neutral, Stage, StageContext, values_under
from stages.data.shares import BLOCK
from stages.distill.recipe import Recipe
from stages.latents import Latents
from stages.methods import METHODS
from stages.methods.base import MethodConfig
from stages.pairs import Pairs, guidance_scales
from stages.teacher import Teacher
from stages.training import TrainingExecution, TrainingSettings
from stages.training.players import training_progress


class Source(Config):
    """Pairs to train on, and their share of every batch."""

    pairs: Annotated[str, Input("pairs")] = Field(description="stage that makes the pairs")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of every batch, relative to the other sources; default: the number of pairs of each",
    )


@dataclass(frozen=True)
class Trained:
    """Noises that a student was trained on: the first `count` of `pairs`, which that student's stage calls `name`.

    Noise is drawn from (seed, number) alone, so all pairs of one seed begin with the same noises.
    """

    pairs: Artifact
    name: str
    count: int


def _sources(value: Any) -> Any:
    """A stage's name stands for a list of one, and in a list for a source of default weight."""
    values = [value] if isinstance(value, str) else value
    return [{"pairs": one} if isinstance(one, str) else one for one in values] if isinstance(values, list) else values


def sources(student: Mapping[str, Artifact]) -> list[Artifact]:
    """The `pairs` artifacts among a student's inputs, in the manifest's order; none if it is trained on latents."""
    return [artifact for field, artifact in student.items() if field.startswith("pairs.")]


def teacher_of(student: Mapping[str, Artifact]) -> Artifact:
    """The teacher, given a student's inputs: that of what it is trained on."""
    return (sources(student) or [student["latents"]])[0].inputs["teacher"]


def _of_method(problems: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    yield from ((f"method.{path}", problem) for path, problem in problems)


class Distill(Stage):
    """Train a student with one of the methods, and export it as a stock diffusers folder.

    It is trained on `pairs`, one stage or a list of `{pairs: STAGE, weight: 2.0}` to be mixed, or on `latents`, as its
    method takes it. A method that takes rounds makes a chain of it: student/16, student/8, ...; whoever reads `student`
    is made once for each of them, as of a matrix, and a single one is read by its whole name."""

    VERSION: ClassVar[int] = 3
    kind: Literal["distill"]
    pairs: Annotated[list[Source] | None, BeforeValidator(_sources)] = Field(
        None, min_length=1, description="pairs to train on: one stage, or a list of stages and their weights"
    )
    latents: Annotated[str | None, Input("latents"), Neutral()] = Field(
        None, description="latents of real images to train on, in place of pairs, for methods that add noise themselves"
    )
    method: Annotated[MethodConfig, Choice("name", METHODS)] = Field(description="the distillation method")
    start_from: Annotated[str | None, Input("distill"), Neutral()] = Field(
        None,
        description="student of the same teacher to start from; default: the teacher's weights",
    )
    training: TrainingSettings = Field(description="how the student is trained")
    held_out: int = Field(
        256,
        ge=1,
        description="number of pairs kept for held-out loss and evaluation: the last ones of the first source",
    )
    execution: TrainingExecution = Field(
        TrainingExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @classmethod
    def chain(cls, settings: Mapping[str, Any]) -> list[Link]:
        method, training = settings.get("method"), settings.get("training")
        method = {"name": method} if isinstance(method, str) else method
        name = method.get("name") if isinstance(method, dict) else None
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None or not isinstance(method, dict) or not isinstance(training, dict):
            return []
        found = []
        for one in kind.rounds(method, settings.get("start_from") is not None):
            own: dict[str, Any] = {**settings, "method": one.method}
            origins: dict[tuple[str, ...], tuple[str, ...]] = {}
            if one.training_steps is not None:
                own["training"] = {**training, "steps": one.training_steps}
                origins["training", "steps"] = ("method", "training_steps", str(one.steps))
            found.append(Link(str(one.steps), own, "start_from", origins))
        return found

    def trained_on(self, inputs: Mapping[str, Artifact]) -> Iterator[Trained]:
        """The noises that this student was trained on, then those of the students that it goes on from: all of each
        source, but of the first source not the last `held_out`. Training on latents draws other noises: nothing."""
        for place, (source, pairs) in enumerate(zip(self.pairs or [], sources(inputs), strict=True)):
            assert isinstance(pairs.stage, Pairs)
            yield Trained(pairs, source.pairs, pairs.stage.count - (self.held_out if place == 0 else 0))
        start = inputs.get("start_from")
        if start:
            assert isinstance(start.stage, Distill)
            yield from start.stage.trained_on(start.inputs)

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        given = "pairs" if self.pairs else "latents"
        if given not in self.method.DATA:
            yield given, f"{self.method.name} is trained on {' or '.join(self.method.DATA)}, not on {given}"
        if self.pairs:
            yield from self._check_pairs(sources(inputs))
        yield from self._check_guidance(inputs)
        yield from _of_method(self.method.check(values_under(inputs, "method")))
        yield from self._check_teacher(given, teacher_of(inputs), inputs.get("latents"))
        yield from self._check_start(given, inputs)

    def _check_teacher(self, given: str, teacher: Artifact, latents: Artifact | None) -> Iterator[tuple[str, str]]:
        known = teacher.stage
        assert isinstance(known, Teacher)
        if known.gaussian:
            yield given, "their teacher is `gaussian:`, which has no network that a student could start from"
        size = known.image_size(teacher.folder)
        if latents and isinstance(latents.stage, Latents) and size not in (None, (latents.stage.images.size,) * 2):
            pixels = f"images of {latents.stage.images.size} pixels, but the teacher makes {size[0]} x {size[1]}"
            yield given, f"they are of {pixels}, and so will its student; encode images of that size"
        as_input = self.method.form.w_range is not None
        unguided = known.why_unguided(as_input, teacher.folder) if self.method.uses_guidance else None
        if unguided:
            yield "method", f"it needs guidance, but {unguided}"
        timesteps = known.timesteps(teacher.folder)
        if timesteps is not None:
            yield from _of_method(self.method.check_timesteps(timesteps))
        prediction = known.prediction(teacher.folder)
        if prediction is not None:
            yield from _of_method(self.method.check_prediction(prediction, self.start_from is None))

    def _check_start(self, given: str, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        start = inputs.get("start_from")
        before = start.stage if start else None
        assert before is None or isinstance(before, Distill)
        if start and teacher_of(start.inputs).fingerprint != teacher_of(inputs).fingerprint:
            yield "start_from", f"{self.start_from} is the student of another teacher than that of `{given}`"
        if start and self.pairs:
            yield from self._check_held_out(sources(inputs)[0], start)
        yield from _of_method(self.method.check_start(before.method if before else None))

    def _check_held_out(self, pairs: Artifact, start: Artifact) -> Iterator[tuple[str, str]]:
        """That no student before was trained on what is held out here."""
        assert isinstance(pairs.stage, Pairs) and isinstance(start.stage, Distill)
        for before in start.stage.trained_on(start.inputs):
            seen = min(before.count, pairs.stage.count) - (pairs.stage.count - self.held_out)
            if before.pairs.seed == pairs.seed and seen > 0:
                yield (
                    "held_out",
                    f"a student that this one goes on from was trained on {seen} of the {self.held_out} noises that "
                    f"are held out, as part of {before.name}; hold the same out of both",
                )

    def _check_guidance(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        if self.method.form.w_range is not None:
            return
        own = guidance_scales(self.method.form, sources(inputs))
        if not own and "latents" in self.method.DATA:
            yield "method", "latents say nothing of guidance_scale: give it, 1 for none"
        if len(own) > 1:
            found = " and ".join(f"{scale:g}" for scale in own)
            remedy = "give the student's" if "latents" in self.method.DATA else "a student of them has one"
            yield "method", f"the pairs have guidance_scale: {found}; {remedy}"
        start = inputs.get("start_from")
        if start and isinstance(start.stage, Distill):
            there = guidance_scales(start.stage.method.form, sources(start.inputs))
            if there and len(own) == 1 and own != there:
                yield "method", f"the student to go on from has guidance_scale: {there[0]:g}, this one {own[0]:g}"

    def _check_pairs(self, found: Sequence[Artifact]) -> Iterator[tuple[str, str]]:
        stages = [artifact.stage for artifact in found if isinstance(artifact.stage, Pairs)]
        assert self.pairs
        if self.held_out >= stages[0].count:
            yield "held_out", f"{self.held_out} pairs held out of {stages[0].count} leave none to train on"
        if "latents" not in self.method.DATA and any(s.sampler.timestep_spacing != "trailing" for s in stages):
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

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Self:
        if (self.pairs is None) == (self.latents is None):
            raise ValueError("give either pairs or latents")
        return self

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        if self.pairs and len({source.weight is None for source in self.pairs}) > 1:
            raise ValueError("give each of the pairs a weight, or none of them")
        return self

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        recipe = Recipe(
            self.method,
            self.training,
            sources(context.inputs),
            [source.weight for source in self.pairs or []],
            self.held_out,
            context.inputs.get("latents"),
            context.inputs.get("start_from"),
            values_under(context.inputs, "method"),
            values_under(context.contents, "method"),
        )
        where = context.output, context.threads, context.fingerprint
        return context.run(_distill, recipe, self.execution, context.seed, *where)


def _distill(*arguments: Any) -> Any:
    from stages.distill.train import distill

    return distill(*arguments)
