"""`kind: evaluate`: compares a student, or particles, with the teacher, and writes figures and an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import SCRATCH, Artifact, Input, Neutral, Progress, Stage, StageContext
from stages.data.images.config import Digits
from stages.diffusion.config import Sampler, covers, in_words
from stages.distill import Distill, sources, teacher_of
from stages.evaluate.config import MIN_SAMPLES, EvaluationExecution, Split
from stages.evaluate.noises import held_out, overlap
from stages.evaluate.parts import FOLDER, SIZE, parts_of
from stages.metrics.protocols import DIVERSITY_PROMPTS, PROTOCOLS
from stages.optimize import Optimize
from stages.pairs import Pairs, guidance_scales
from stages.probe import Probe
from stages.reference import Reference
from stages.teacher import Teacher


def subject(inputs: Mapping[str, Artifact]) -> tuple[Artifact, Artifact | None]:
    """Return the pairs whose noises, prompts and teacher an evaluation uses, and the student if there is one."""
    student = inputs.get("student")
    return inputs.get("pairs") or sources(student.inputs if student else {})[0], student


class Evaluate(Stage):
    """Compares a student with its teacher on the same prompts and noises. With `pairs` and no student, compares the
    teacher in few steps with the teacher in all its steps. Writes metrics.json and an HTML page.

    The student was not trained on any of the noises. The first noises are the held-out ones of `pairs` (default: the
    student's training pairs). Further noises are new ones of the same seed. A student that takes the guidance scale as
    an input is sampled at `guidance_scale` (default: the scale of each pair). Teacher and student compute in the dtype
    of the pairs.

    `real` names a probe. It adds prompt accuracy, and distances to held-out real images in the probe's features.
    Without `real`, an evaluation measures only the MSE to the teacher's latents, seconds and network calls.

    Use `split: validation` to choose settings, and `split: test` to report the chosen student. The two splits share no
    noise. No validation noise is in stored pairs, so each evaluation on them runs the teacher again.

    `reference` adds FID and the other standard metrics of a `reference` stage. Samples are measured in parts. So the
    images are never all in memory, and several workers can share the work (`resources`).

    With `particles`, compares the objects of an optimize stage with as many samples of their teacher.
    """

    VERSION: ClassVar[int] = 6
    PARALLEL: ClassVar[bool] = True
    kind: Literal["evaluate"]
    student: Annotated[str | None, Input("distill")] = Field(None, description="student to measure")
    pairs: Annotated[str | None, Input("pairs")] = Field(
        None,
        description="pairs that give noises, prompts, guidance scale and the teacher's latents; default: those that "
        "the student was trained on; without a student, only the teacher is measured",
    )
    particles: Annotated[str | None, Input("optimize"), Neutral()] = Field(
        None, description="objects to measure, in place of a student"
    )
    sampler: Annotated[Sampler | None, Neutral()] = Field(
        None,
        description="how the teacher is sampled for the comparison with particles; default: 50 steps at guidance_scale "
        "3",
    )
    real: Annotated[str | None, Input("probe")] = Field(
        None, description="probe of the real images to compare with; if left out, nothing is compared with real images"
    )
    reference: Annotated[str | None, Input("reference"), Neutral()] = Field(
        None,
        description="reference stage with the networks and real images of FID and the other standard metrics; if left "
        "out, these metrics are not measured",
    )
    samples: int = Field(
        2000,
        ge=20,
        description="number of samples, of the student and of the teacher",
    )
    split: Split = Field(
        "test",
        description="noises to measure on: validation to choose settings, test to report; they share no noise",
    )
    steps: Annotated[int | None, Neutral()] = Field(
        None,
        ge=1,
        description="number of sampling steps of the student, if its method allows a choice; default: the method's",
    )
    guidance_scale: Annotated[float | None, Neutral()] = Field(
        None,
        ge=1,
        description="guidance scale of teacher and student; default: that of each pair; with another scale, the "
        "teacher is run again",
    )
    teacher_steps: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="numbers of steps in which the teacher is also sampled, each fewer than the steps of the pairs; "
        "default: all of 4, 2 and 1 that are fewer",
    )
    execution: EvaluationExecution = Field(
        EvaluationExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    @model_validator(mode="after")
    def _a_subject(self) -> Self:
        if self.particles:
            of_students = (
                "student",
                "pairs",
                "reference",
                "samples",
                "split",
                "steps",
                "guidance_scale",
                "teacher_steps",
            )
            others = [name for name in of_students if getattr(self, name) != type(self).model_fields[name].default]
            if others:
                raise ValueError(f"with particles, leave {' and '.join(others)} out")
            return self
        if self.sampler:
            raise ValueError("sampler applies to particles; a student is measured with the sampler of its pairs")
        if self.student is None and self.pairs is None:
            raise ValueError("give student, pairs or both; or particles")
        if self.student is None and self.steps:
            raise ValueError("steps applies to a student; for the teacher, give teacher_steps")
        return self

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        if self.particles:
            teacher = inputs["particles"].inputs["teacher"]
            assert isinstance(teacher.stage, Teacher)
            scale = (self.sampler or Sampler()).guidance_scale
            if isinstance(scale, tuple):
                yield "sampler.guidance_scale", "particles are compared at one guidance scale; give one number"
            guided = scale != 1
            unguided = teacher.stage.guidance_error(False, teacher.folder) if guided else None
            if unguided:
                yield "sampler", f"it guides the teacher, but {unguided}; set guidance_scale: 1.0"
            yield from self._check_prompt(inputs["particles"].stage, inputs.get("real"))
            return
        if self.student and not self.pairs and not sources(inputs["student"].inputs):
            yield "student", "it was not trained on pairs; give `pairs`, for noises and prompts to compare on"
            return
        found, student = subject(inputs)
        pairs = found.stage
        if student and isinstance(student.stage, Distill) and isinstance(pairs, Pairs):
            yield from self._check_student(student, student.stage, found, pairs)
        assert isinstance(pairs, Pairs)
        probe = inputs["real"].stage if self.real else None
        images = probe.images if isinstance(probe, Probe) else None
        if isinstance(images, Digits) and pairs.prompts and pairs.prompts.images != images:
            yield "real", f"prompt accuracy needs pairs with prompts: {images.name}, not {str(pairs.prompts)!r}"
        if getattr(found.inputs["teacher"].stage, "gaussian", None):
            yield "pairs" if self.pairs else "student", "the teacher is `gaussian:`, which makes no images"
        teacher = found.inputs["teacher"]
        assert isinstance(teacher.stage, Teacher)
        unguided = teacher.stage.guidance_error(False, teacher.folder) if (self.guidance_scale or 1) > 1 else None
        if unguided:
            yield "guidance_scale", f"it guides the teacher, but {unguided}"
        if pairs.prompts is None and self.guidance_scale not in (None, 1):
            yield "guidance_scale", "guidance needs prompts, but the pairs have none; leave it out"
        steps = self.teacher_steps or []
        if len(set(steps)) < len(steps):
            yield "teacher_steps", "a number of steps is given twice"
        if steps and max(steps) >= pairs.sampler.steps:
            yield (
                "teacher_steps",
                f"{max(steps)} is not fewer than the {pairs.sampler.steps} steps of the pairs",
            )
        if self.real and self.samples < MIN_SAMPLES:
            yield "samples", f"distances to real images need at least {MIN_SAMPLES} samples"

    def _check_prompt(self, particles: Stage, probe: Artifact | None) -> Iterator[tuple[str, str]]:
        assert isinstance(particles, Optimize)
        if particles.prompt and probe and isinstance(probe.stage, Probe) and isinstance(probe.stage.images, Digits):
            from stages.data.images.digits import prompt_labels  # imports NumPy

            try:
                prompt_labels([particles.prompt])
            except ValueError as error:
                yield "real", f"prompt accuracy needs a prompt that the probe knows: {error}"

    def _check_student(
        self, student: Artifact, stage: Distill, found: Artifact, pairs: Pairs
    ) -> Iterator[tuple[str, str]]:
        if teacher_of(student.inputs).fingerprint != found.inputs["teacher"].fingerprint:
            yield "pairs", f"they were made by another teacher than {self.student}'s"
        repeated = overlap(found, student) if self.pairs and self.split == "test" else None
        if repeated:
            yield (
                "pairs",
                f"{self.pairs} has {min(repeated.count, pairs.count)} of the noises of {repeated.name}, which "
                f"{self.student} was trained on: both have seed {found.seed}; give {self.pairs} a `seed:` of its own",
            )
        problem = stage.method.step_count_error(self.steps) if self.steps else None
        if problem:
            yield "steps", problem
        scale = self.guidance_scale or pairs.sampler.guidance_scale
        learned = next(iter(guidance_scales(stage.method.form, sources(student.inputs))), None)
        if learned is not None and not covers(learned, scale):
            given = "guidance_scale" if self.guidance_scale else "pairs" if self.pairs else "student"
            source = "the evaluation has" if self.guidance_scale else "the pairs have"
            knows = "takes scales of" if isinstance(learned, tuple) else "has learned"
            yield given, f"{source} guidance_scale: {in_words(scale)}; the student {knows} {in_words(learned)}"

    def run(self, context: StageContext) -> Mapping[str, Any]:
        if self.particles:
            measured = context.inputs["particles"], self.sampler or Sampler(), context.inputs.get("real")
            where = self.execution, context.seed, context.output, context.threads
            return context.run(_particles, *measured, *where)
        from stages.evaluate.run import evaluate
        from stages.evaluate.sides import Measurer

        found, student = subject(context.inputs)
        assert isinstance(found.stage, Pairs)
        sampler, probe = found.stage.sampler, context.inputs.get("real")
        if self.guidance_scale:
            sampler = sampler.model_copy(update={"guidance_scale": self.guidance_scale})
        fewer = self.teacher_steps if self.teacher_steps is not None else [n for n in (4, 2, 1) if n < sampler.steps]
        reference = context.inputs.get("reference")
        prompts = DIVERSITY_PROMPTS if reference and _has_lpips(reference) else 0
        folder, parts = context.output / SCRATCH / FOLDER, parts_of(self.samples, probe is not None, prompts)
        make = partial(
            Measurer,
            pairs=found,
            student=student,
            student_steps=self.steps,
            noises=held_out(found, student, self.split, self.samples),
            guidance_scale=self.guidance_scale,
            teacher_steps=fewer,
            probe=probe,
            reference=reference,
            execution=self.execution,
            folder=folder,
            threads=context.threads,
        )
        missing = [part for part in parts if not (folder / part.file).exists()]
        done = self.samples - sum(part.stop - part.start for part in missing if part.what == "samples")
        for part, _ in context.map(make, missing):
            done += part.stop - part.start if part.what == "samples" else 0
            context.progress(Progress(done, self.samples, "samples"))
        in_steps = [sampler.model_copy(update={"steps": steps}) for steps in (sampler.steps, *fewer)]
        calls = {f"teacher_{one.steps}": one.network_calls for one in in_steps}
        if student:
            assert isinstance(student.stage, Distill)
            calls["student"] = self.steps or student.stage.method.form.steps
        settings = self.split, self.guidance_scale, probe, reference, self.execution.micro_batch
        return context.run(evaluate, found, student, calls, parts, folder, *settings, context.output)

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        reference = inputs["reference"].stage if self.reference else None
        if isinstance(reference, Reference) and PROTOCOLS[reference.preset].samples != self.samples:
            wanted = PROTOCOLS[reference.preset].samples
            yield (
                f"{reference.preset} has {wanted:,} samples, this evaluation {self.samples:,}: its figures cannot be "
                "compared with published ones"
            )

    def progress_in(self, work: Path, pool: Path) -> str | None:
        done = len(list((work / SCRATCH / FOLDER).glob("samples-*.safetensors")))
        return f"{done} parts of {SIZE} samples are measured" if done else None


def _has_lpips(reference: Artifact) -> bool:
    assert isinstance(reference.stage, Reference)
    return reference.stage.lpips is not None


def _particles(*arguments: Any) -> Any:
    from stages.evaluate.particles import evaluate_particles

    return evaluate_particles(*arguments)
