"""What a method tells the training loop: its players, and for each step whose turn it is with which loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Choice, Config, StageError, values_under
from stages.diffusion.form import Form
from stages.diffusion.prediction import Prediction
from stages.losses.config import LOSSES, LossConfig, LossMaterials
from stages.training import Batch, Method, TrainingSettings

if TYPE_CHECKING:
    from stages.losses.config import Distance
    from stages.networks.denoiser import Denoiser
    from stages.networks.network import NetworkTeacher
    from stages.networks.student import Student

OneStepPrediction = Literal["v_prediction", "epsilon"]


@dataclass(frozen=True)
class Materials:
    """What a distillation method is given to work with."""

    teacher: NetworkTeacher
    """Frozen; `teacher.unet` may be copied, and then retired, not changed."""
    training: TrainingSettings
    start: Artifact | None = None
    """The student to go on from; None: the teacher."""
    guidance_scale: float = 1.0
    """That the student has built in, where its form does not say."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    """What the method's fields name, by their dotted path in its settings."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """What the method's `Content` fields were found to hold, likewise."""
    examples: Callable[[], Batch] | None = None
    """Gives a few hundred of the pairs that are trained on; None where there are no pairs."""

    def distance(self, loss: LossConfig, field: str = "loss") -> Distance:
        """The loss that stands in the method's `field`."""
        return loss.create(
            LossMaterials(self.teacher, values_under(self.inputs, field), values_under(self.contents, field))
        )

    def one_step_student(self, prediction: OneStepPrediction) -> Student:
        """With the teacher's weights, or those of the student to go on from.

        A teacher's last layer is of no use to a student of another prediction type. That of the student is then
        fitted to a few hundred of the pairs that it is trained on."""
        from stages.networks.head import begins_at_zero

        student = self.student(Form(prediction=prediction))
        if self.examples and self.start is None and begins_at_zero(self.teacher.prediction, prediction):
            pairs = self.examples()
            try:
                student.fit_head(pairs["noise"], pairs["latent"], self.teacher.encode_prompts(pairs["prompts"]))
            except ValueError as error:
                raise StageError(str(error)) from None
        return student

    def student(self, form: Form, grid_steps: int | None = None) -> Student:
        """The same, of any form; `grid_steps`: a multiple of its steps, where it is trained at more points. Raises
        StageError if the teacher's schedule has fewer."""
        from stages.networks.student import Student

        try:
            student = Student.from_teacher(self.teacher, form, grid_steps)
            if self.start is not None:
                student.go_on_from(self.start.folder)
        except ValueError as error:
            raise StageError(str(error)) from None
        return student

    def many_step(self, form: Form) -> Denoiser:
        """The teacher at the points of the grid of such a student, guided as it is to be. Raises StageError as
        `student`."""
        from stages.diffusion.grid import Grid
        from stages.networks.denoiser import ManyStep

        try:
            grid = Grid.of(form.schedule, self.teacher.schedule, form.steps)
        except ValueError as error:
            raise StageError(str(error)) from None
        return ManyStep(self.teacher, grid, form.guidance_scale or self.guidance_scale)

    def before(self) -> Student | None:
        """The student to go on from, as it was left, which then teaches in the teacher's place; None: there is none."""
        from stages.networks.student import Student

        if self.start is None:
            return None
        self.teacher.retire()
        return Student.load(self.start.folder, self.teacher)


@dataclass(frozen=True)
class Round:
    """A part of a method that takes rounds: a stage of its own."""

    steps: int
    """Of its student: what it is called by."""
    method: dict[str, Any]
    """The method's settings in it, as in a manifest."""
    training_steps: Any = None
    """Instead of the stage's; None: the stage's."""


class MethodConfig(Config):
    """A method's part of the manifest."""

    DATA: ClassVar[tuple[Literal["pairs", "latents"], ...]] = ("pairs",)
    """What it can be trained on."""
    name: str

    @classmethod
    def rounds(cls, settings: Mapping[str, Any], goes_on: bool) -> list[Round]:
        """What these settings, not validated yet, come to, in order, each going on from the student before; none: it
        takes no rounds, or they make no sense, which validation will say. `goes_on`: the stage has a `start_from`."""
        return []

    @property
    def form(self) -> Form:
        """Of its student."""
        return Form()

    @property
    def guided(self) -> bool:
        """Whether it asks the teacher with and without a prompt."""
        return self.form.w_range is not None or (self.form.guidance_scale or 1.0) > 1.0

    def why_not_in(self, steps: int) -> str | None:
        """Why its student cannot be sampled in so many steps; None if it can."""
        return None if steps == self.form.steps else f"the student's steps are {self.form.steps}, not {steps}"

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that contradicts the stages that its fields name."""
        yield from ()

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        """The same for the method of the student to go on from; None: it begins with the teacher."""
        if start is not None:
            yield from differences(start.form, self.form)

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        """The same, given how many timesteps the teacher's schedule has."""
        yield from ()

    def check_prediction(self, teacher: Prediction, begins: bool) -> Iterator[tuple[str, str]]:
        """The same, given the teacher's prediction type. `begins`: the student begins with the teacher's weights."""
        yield from ()

    def create(self, materials: Materials) -> Method:
        """The method itself; this is where torch is imported."""
        raise TypeError(f"{type(self).__name__} does not say how it is made")


def differences(start: Form, own: Form, but: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """A problem for each way, but for some, in which the student to go on from is of another form. Its guidance may be
    that of its pairs, which only the stage knows."""
    for name in Form.model_fields:
        there, here = getattr(start, name), getattr(own, name)
        open_ = name == "prediction" and None in (there, here)  # the teacher's, which the worker compares
        if name not in (*but, "guidance_scale") and not open_ and there != here:
            yield name, f"the student to go on from has {name}: {there}, this one {name}: {here}"


class OneStepConfig(MethodConfig):
    """What all methods have in common whose student maps a stored noise to its stored image in one call."""

    loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(
        description="the distance of the student's output to the teacher's"
    )
    prediction: OneStepPrediction = Field(
        "v_prediction",
        description="what the student's U-Net puts out; v is well-behaved at the noisiest timestep; where the teacher "
        "predicts epsilon, the last layer of a v student is first fitted to a few hundred pairs (ridge regression)",
    )

    @property
    def form(self) -> Form:
        return Form(prediction=self.prediction)

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(values_under(inputs, "loss")))
