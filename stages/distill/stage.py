"""The stage of `kind: distill`: its settings, its checks against other stages, and its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stages.base import SCRATCH, Artifact, Choice, Config, Input, Link, Neutral, Stage, StageContext, values_under
from stages.data.pool import PROMPTS
from stages.data.prompts.config import Prompts
from stages.data.shares import BLOCK
from stages.diffusion.config import Scale, in_words
from stages.diffusion.prediction import Prediction
from stages.distill.recipe import Origin, Recipe
from stages.latents import Latents
from stages.methods import METHODS
from stages.methods.base import MethodConfig, Stream, StudentTraining
from stages.pairs import Pairs, guidance_scales
from stages.teacher import Teacher
from stages.teacher.config import FROM
from stages.teacher.stage import adopt, ask, licence_of
from stages.training import StudentExecution
from stages.training.players import training_progress


class Source(Config):
    """A source of training pairs and its share of every batch."""

    pairs: Annotated[str, Input("pairs")] = Field(description="stage that makes the pairs")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of every batch, relative to the weights of the other sources; default: the number of pairs "
        "of each source",
    )


@dataclass(frozen=True)
class Trained:
    """Noises that a student was trained on.

    Each noise is determined by the seed of its pairs stage and its number. So the noises of two pairs stages with the
    same seed are equal.
    """

    pairs: Artifact
    name: str
    """The name of the pairs stage in the manifest."""
    count: int
    """The student was trained on the first `count` noises of `pairs`."""


def _sources(value: Any) -> Any:
    """Convert the short forms of `pairs`: a stage's name to a list, and names in a list to sources."""
    values = [value] if isinstance(value, str) else value
    return [{"pairs": one} if isinstance(one, str) else one for one in values] if isinstance(values, list) else values


def sources(student: Mapping[str, Artifact]) -> list[Artifact]:
    """Return the `pairs` artifacts among a student's inputs, in the manifest's order. May be empty."""
    return [artifact for field, artifact in student.items() if field.startswith("pairs.")]


def teacher_of(student: Mapping[str, Artifact]) -> Artifact:
    """Return the teacher from a student's inputs: that of its pairs or latents, or else its own `teacher`."""
    data = [*sources(student), *([student["latents"]] if "latents" in student else [])]
    return data[0].inputs["teacher"] if data else student["teacher"]


def _of_method(problems: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Prefix the field paths of a method's problems with `method.`."""
    yield from ((f"method.{path}", problem) for path, problem in problems)


class Start(Config):
    """Another network that a student starts from, given by `pipeline` or `teacher`. It may be smaller or larger than
    the network of the student's teacher. Both pipelines need the same family, VAE, text encoder and noise schedule."""

    pipeline: Annotated[str | None, FROM] = Field(
        None, description="a diffusers folder, a hub id, digits or digit_scenes"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    teacher: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None, description="another teacher, such as one with `train: {like: TEACHER}`"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pipeline is None) == (self.teacher is None):
            raise ValueError("give either pipeline or teacher")
        if self.revision and self.teacher:
            raise ValueError("revision needs pipeline")
        return self

    def prediction(self, teacher: Artifact | None) -> Prediction | None:
        """Return the prediction type of the network. None: it is not known yet.

        `teacher` is the artifact that the field `teacher` names, if it is given."""
        if teacher:
            assert isinstance(teacher.stage, Teacher)
            like = teacher.inputs.get("train.like")
            return self.prediction(like) if like else teacher.stage.prediction(teacher.folder)
        folder = Path(FROM.source(self.pipeline or ""))
        return ask(folder if folder.is_dir() else None, lambda adapter, found: adapter.prediction_of(found))


class Distill(Stage):
    """Trains a student by one of the methods, and exports it as a diffusers pipeline.

    The method decides which data the student needs: `pairs`, `latents`, `prompts` or several of them. `pairs` is one
    stage, or a list of stages that are mixed. An entry of the list can have a weight: `{pairs: STAGE, weight: 2.0}`.

    A method with several rounds makes a chain of stages: student/16, student/8, ... A stage that reads `student` is
    then made once for each of them, as with a matrix. A stage that reads `student/8` is made only for this one."""

    VERSION: ClassVar[int] = 3
    kind: Literal["distill"]
    pairs: Annotated[
        list[Source] | None, BeforeValidator(_sources, json_schema_input_type=str | list[str | Source] | None)
    ] = Field(None, min_length=1, description="pairs to train on: one stage, or a list of stages and their weights")
    latents: Annotated[str | None, Input("latents"), Neutral()] = Field(
        None, description="latents of real images to train on, for methods that add noise themselves"
    )
    prompts: Annotated[Prompts | None, Neutral()] = Field(
        None,
        description="prompts to train on, for methods that sample from prompts: a path, or digits or digit_scenes for "
        "the captions of that image set",
    )
    teacher: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None, description="the teacher, if only prompts are given; pairs and latents already have a teacher"
    )
    method: Annotated[MethodConfig, Choice("name", METHODS)] = Field(description="the distillation method")
    start_from: Annotated[str | None, Input("distill"), Neutral()] = Field(
        None,
        description="another student of the same teacher, whose weights the student starts from; default: the "
        "teacher's weights",
    )
    start: Annotated[Start | None, Neutral()] = Field(
        None, description="another network that the student starts from; excludes start_from"
    )
    training: StudentTraining = Field(description="how the student is trained")
    held_out: int = Field(
        256,
        ge=0,
        description="number of pairs that are kept out of training, for the held-out loss and for evaluations: the "
        "last pairs of the first source; with 0, evaluations need other `pairs`",
    )
    execution: StudentExecution = Field(
        StudentExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @classmethod
    def chain(cls, settings: Mapping[str, Any]) -> list[Link]:
        method, training = settings.get("method"), settings.get("training")
        method = {"name": method} if isinstance(method, str) else method
        name = method.get("name") if isinstance(method, dict) else None
        kind = METHODS.get(name) if isinstance(name, str) else None
        if kind is None or not isinstance(method, dict) or not isinstance(training, dict):
            return []
        found: list[Link] = []
        for one in kind.rounds(method, settings.get("start_from") is not None):
            own: dict[str, Any] = {**settings, "method": one.method}
            if found:
                own.pop("start", None)  # later links start from the link before
            origins: dict[tuple[str, ...], tuple[str, ...]] = {}
            if one.training_steps is not None:
                own["training"] = {**training, "steps": one.training_steps}
                origins["training", "steps"] = ("method", "training_steps", str(one.steps))
            found.append(Link(str(one.steps), own, "start_from", origins))
        return found

    def trained_on(self, inputs: Mapping[str, Artifact]) -> Iterator[Trained]:
        """Yield the noises that this student was trained on, then those of the earlier students in `start_from`.

        These are the noises of its pairs, except the held-out ones. A student of latents or prompts has none, because
        its noises do not come from pairs."""
        for place, (source, pairs) in enumerate(zip(self.pairs or [], sources(inputs), strict=True)):
            assert isinstance(pairs.stage, Pairs)
            yield Trained(pairs, source.pairs, pairs.stage.count - (self.held_out if place == 0 else 0))
        start = inputs.get("start_from")
        if start:
            assert isinstance(start.stage, Distill)
            yield from start.stage.trained_on(start.inputs)

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        given = self.streams[0]
        if set(self.streams) not in self.method.DATA:
            wanted = " or ".join(" and ".join(sorted(streams)) for streams in self.method.DATA)
            yield given, f"{self.method.name} is trained on {wanted}, not on {' and '.join(self.streams)}"
        else:
            yield from _of_method(self.method.check_training(self.streams, self.training.steps))
        if self.pairs:
            yield from self._check_pairs(sources(inputs))
            latents = inputs.get("latents")
            if latents and latents.inputs["teacher"].fingerprint != teacher_of(inputs).fingerprint:
                yield "latents", "they were made with another teacher than `pairs`"
        yield from self._check_guidance(inputs)
        yield from _of_method(self.method.check(values_under(inputs, "method")))
        scales = guidance_scales(self.method.form, sources(inputs))
        yield from self._check_teacher(
            given, teacher_of(inputs), inputs.get("latents"), inputs.get("start.teacher"), scales
        )
        yield from self._check_start(given, inputs)

    def _check_teacher(
        self, given: str, teacher: Artifact, latents: Artifact | None, other: Artifact | None, scales: Sequence[Scale]
    ) -> Iterator[tuple[str, str]]:
        """Yield a problem for each setting that does not fit the teacher. `other` is the teacher in `start`, and
        `scales` the guidance scales that the student learns."""
        known = teacher.stage
        assert isinstance(known, Teacher)
        if known.gaussian:
            yield given, "their teacher is `gaussian:`, which has no network for a student to start from"
        if known.cooperating and not self._needs_pairs:
            yield (
                "method",
                "a teacher of host and guest can only sample whole trajectories: use a method that needs pairs",
            )
        if other and isinstance(other.stage, Teacher) and other.stage.gaussian:
            yield "start.teacher", "it is `gaussian:`, which has no network"
        size = known.image_size(teacher.folder)
        if latents and isinstance(latents.stage, Latents) and size not in (None, (latents.stage.images.size,) * 2):
            pixels = f"images of {latents.stage.images.size} pixels, but the teacher makes {size[0]} x {size[1]}"
            yield "latents", f"they are of {pixels}; encode images of that size"
        as_input = any(isinstance(scale, tuple) for scale in scales)
        unguided = known.guidance_error(as_input, teacher.folder) if self.method.uses_guidance or as_input else None
        if unguided:
            yield "method", f"the method needs guidance, but {unguided}"
        if self.method.has_discriminator and known.has_features(teacher.folder) is False:
            yield (
                "method",
                "the method trains a discriminator, which does not support the teacher's network",
            )
        timesteps = known.timesteps(teacher.folder)
        if timesteps is not None:
            yield from _of_method(self.method.check_timesteps(timesteps))
        prediction = self.start.prediction(other) if self.start else known.prediction(teacher.folder)
        if prediction is not None:
            yield from _of_method(self.method.check_prediction(prediction, self.start_from is None))
            lora = self.training.lora_error(self.method.form, prediction)
            if lora:
                yield "training.lora", lora

    def _check_start(self, given: str, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        start = inputs.get("start_from")
        previous = start.stage if start else None
        assert previous is None or isinstance(previous, Distill)
        if start and teacher_of(start.inputs).fingerprint != teacher_of(inputs).fingerprint:
            yield "start_from", f"{self.start_from} is the student of another teacher than that of `{given}`"
        if start and self.pairs:
            yield from self._check_held_out(sources(inputs)[0], start)
        lora, previous_lora = self.training.lora, previous.training.lora if previous else None
        if previous and lora and not (previous_lora and lora.continues(previous_lora)):
            yield (
                "training.lora",
                "the student in start_from has another rank, alpha or targets; set the same in both stages"
                if previous_lora
                else "the student in start_from has no LoRA weights; leave training.lora out",
            )
        yield from _of_method(self.method.check_start(previous.method if previous else None))

    def _check_held_out(self, pairs: Artifact, start: Artifact) -> Iterator[tuple[str, str]]:
        """Yield a problem for each earlier student that was trained on noises which this stage holds out."""
        assert isinstance(pairs.stage, Pairs) and isinstance(start.stage, Distill)
        for before in start.stage.trained_on(start.inputs):
            seen = min(before.count, pairs.stage.count) - (pairs.stage.count - self.held_out)
            if before.pairs.seed == pairs.seed and seen > 0:
                yield (
                    "held_out",
                    f"an earlier student in start_from was trained on {seen} of the {self.held_out} noises that are "
                    f"held out, as part of {before.name}; hold out the same noises in both stages",
                )

    def _check_guidance(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        if self.method.form.w_range is not None:
            return
        own = guidance_scales(self.method.form, sources(inputs))
        drawn = next((scale for scale in own if isinstance(scale, tuple)), None)
        if drawn and not self.method.LEARNS_RANGE:
            yield (
                "method",
                f"{self.method.name} learns one guidance scale, but the pairs have guidance_scale: {in_words(drawn)}; "
                "use pairs of one scale, or set guidance_scale in the method",
            )
        if not own and not self._needs_pairs:
            yield "method", f"{self.streams[0]} have no guidance_scale: set it in the method; 1 means no guidance"
        if len(own) > 1:
            found = " and ".join(map(in_words, own))
            remedy = "use pairs with the same scale" if self._needs_pairs else "set one in the method"
            yield "method", f"the pairs have guidance_scale: {found}; {remedy}"
        start = inputs.get("start_from")
        if start and isinstance(start.stage, Distill):
            old = guidance_scales(start.stage.method.form, sources(start.inputs))
            if old and len(own) == 1 and own != old:
                yield (
                    "method",
                    f"the student in start_from has guidance_scale: {in_words(old[0])}, this one has "
                    f"{in_words(own[0])}",
                )

    def _check_pairs(self, found: Sequence[Artifact]) -> Iterator[tuple[str, str]]:
        stages = [artifact.stage for artifact in found if isinstance(artifact.stage, Pairs)]
        assert self.pairs
        if self.held_out >= stages[0].count:
            yield "held_out", f"{self.held_out} pairs held out of {stages[0].count} leave none to train on"
        if self.method.learns_pairs and any(s.sampler.timestep_spacing != "trailing" for s in stages):
            yield (
                "pairs",
                "a one-step student needs pairs solved with timestep_spacing: trailing, from the last timestep",
            )
        if len({isinstance(stage.sampler.guidance_scale, tuple) for stage in stages}) > 1:
            yield "pairs", "some store a guidance scale for each pair, others have one for all; use pairs of one kind"
        if len({artifact.inputs["teacher"].fingerprint for artifact in found}) > 1:
            yield "pairs", "they were made with several teachers; a student has one"
        if len({artifact.seed for artifact in found}) < len(found):
            yield (
                "pairs",
                "two of them have the same seed, and so the same noises: noises held out of one would be trained on in "
                "the other; give one stage another `seed:`",
            )
        weights = [source.weight or stage.count for source, stage in zip(self.pairs, stages, strict=True)]
        light = next((s.pairs for s, w in zip(self.pairs, weights, strict=True) if w < sum(weights) / BLOCK), None)
        if light is not None:
            yield "pairs", f"{light} has less than 1/{BLOCK} of the weight and would never be drawn"

    @property
    def streams(self) -> list[Stream]:
        """The data streams of training. Their order determines the seed of each."""
        given: dict[Stream, Any] = {"pairs": self.pairs, "latents": self.latents, "prompts": self.prompts}
        return [stream for stream, value in given.items() if value is not None]

    @property
    def _needs_pairs(self) -> bool:
        """Whether the method cannot be trained without pairs."""
        return all("pairs" in streams for streams in self.method.DATA)

    @model_validator(mode="after")
    def _some_data(self) -> Self:
        if not self.streams:
            raise ValueError("give what the student is trained on: pairs, latents or prompts")
        if self.streams == ["prompts"] and self.teacher is None:
            raise ValueError("prompts have no teacher: give `teacher`")
        if self.streams != ["prompts"] and self.teacher is not None:
            raise ValueError("pairs and latents already have a teacher: leave `teacher` out")
        if self.start and self.start_from:
            raise ValueError("give either start or start_from")
        if self.start and self.training.lora:
            raise ValueError("training.lora adds to the teacher's weights: leave start out")
        return self

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        if self.pairs and len({source.weight is None for source in self.pairs}) > 1:
            raise ValueError("give each of the pairs a weight, or none of them")
        return self

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        stages = (one.stage for one in sources(inputs))
        found = dict.fromkeys(stage.sampler.guidance_scale for stage in stages if isinstance(stage, Pairs))
        yield from self.method.warnings(list(found))

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        prompts = context.output / SCRATCH
        if self.prompts and not (prompts / PROMPTS).exists():
            from stages.data.prompts.table import write_table

            prompts.mkdir(parents=True, exist_ok=True)
            write_table(self.prompts, context.contents, prompts / PROMPTS)
        origin = None
        other = context.inputs.get("start.teacher")
        if other:
            origin = Origin(other.folder, {"source": f"teacher/{other.fingerprint}", "licence": licence_of(other)})
        elif self.start and self.start.pipeline:  # copied to the store: the worker may be on another machine
            folder = context.output / SCRATCH / "start"
            origin = Origin(folder, adopt(self.start.pipeline, context.contents["start.pipeline"], folder))
        recipe = Recipe(
            self.method,
            self.training,
            self.streams,
            teacher_of(context.inputs),
            sources(context.inputs),
            [source.weight for source in self.pairs or []],
            self.held_out,
            context.inputs.get("latents"),
            prompts,
            context.inputs.get("start_from"),
            origin,
            values_under(context.inputs, "method"),
            values_under(context.contents, "method"),
        )
        where = context.output, context.threads, context.fingerprint
        return context.run(_distill, recipe, self.execution, context.seed, *where)


def _distill(*arguments: Any) -> Any:
    from stages.distill.train import distill

    return distill(*arguments)
