"""The stage of `kind: optimize`: its settings, its checks, and its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Input, Stage, StageContext
from stages.data.prompts.vocabulary import prompt_warnings
from stages.optimize.config import ObjectiveConfig, ObjectTraining, RepresentationConfig
from stages.optimize.objectives import OBJECTIVES
from stages.optimize.representations import REPRESENTATIONS
from stages.teacher import Teacher
from stages.training import StudentExecution
from stages.training.players import training_progress


class Optimize(Stage):
    """Distils a teacher's score into objects, called particles: latents, images, radiance fields, textures. No
    generator is trained. The particles themselves are changed until their renders are probable under the teacher.
    """

    VERSION: ClassVar[int] = 1
    kind: Literal["optimize"]
    teacher: Annotated[str, Input("teacher")] = Field(description="stage that makes the teacher")
    prompt: str = Field("", description="what all particles show; empty for an unconditional teacher")
    particles: int = Field(1, ge=1, description="number of objects that are optimised together, from different starts")
    representation: Annotated[RepresentationConfig, Choice("name", REPRESENTATIONS)] = Field(
        description="kind of object that a particle is"
    )
    objective: Annotated[ObjectiveConfig, Choice("name", OBJECTIVES)] = Field(
        description="loss of the particles, computed with the teacher's score"
    )
    training: ObjectTraining = Field(description="how the particles are trained")
    execution: StudentExecution = Field(
        StudentExecution(), description="how the stage is run; changing it makes nothing stale"
    )

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        teacher = inputs["teacher"]
        assert isinstance(teacher.stage, Teacher)
        if teacher.stage.gaussian:
            yield "teacher", "a `gaussian:` teacher makes no images"
        if teacher.stage.cooperating:
            yield "teacher", "a teacher of host and guest can only sample whole trajectories"
        unguided = teacher.stage.guidance_error(False, teacher.folder) if self.objective.uses_guidance else None
        if unguided:
            yield "objective", f"it needs guidance, but {unguided}; set guidance_scale: 1.0"
        yield from ((f"representation.{path}", problem) for path, problem in self.representation.check())
        yield from ((f"objective.{path}", problem) for path, problem in self.objective.check(self.training.steps))

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        teacher = inputs["teacher"]
        folder = teacher.stage.known(teacher.folder) if isinstance(teacher.stage, Teacher) else None
        if folder and self.prompt:
            yield from prompt_warnings(folder, [self.representation.prompts(self.prompt)])
        if self.objective.uses_guidance and not self.prompt:
            yield "without a prompt, guidance has no effect; give a prompt, or set guidance_scale: 1.0"

    def progress_in(self, work: Any, pool: Any) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        self.representation.prepare(context.output)
        where = context.seed, context.output, context.threads
        return context.run(_optimize, self, context.inputs["teacher"], *where)


def _optimize(*arguments: Any) -> Any:
    from stages.optimize.train import optimize

    return optimize(*arguments)
