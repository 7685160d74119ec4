"""What a method tells the training loop: its players, and for each step whose turn it is with which loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from stages.base import Artifact, Choice, Config, Execution, StageError, below
from stages.diffusion.form import Form
from stages.diffusion.prediction import Prediction
from stages.losses.config import LOSSES, LossConfig, LossMaterials

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.losses.config import Distance
    from stages.networks.denoiser import Denoiser
    from stages.networks.network import NetworkTeacher
    from stages.networks.student import Student

Batch = Mapping[str, Any]
OneStepPrediction = Literal["v_prediction", "epsilon"]


class TrainingSettings(Config):
    """How the networks of a stage are optimised: AdamW, linear warm-up, then constant or falling to zero."""

    steps: int = Field(ge=1, description="optimizer steps, each of `accumulate` batches")
    batch_size: int = Field(64, ge=1, description="samples a batch; a step sees `accumulate` times as many")
    learning_rate: float = Field(1e-3, gt=0, description="its peak: after the warm-up, before the decay")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly to its peak")
    decay: Literal["constant", "cosine", "linear", "ramp"] = Field(
        "cosine",
        description="of the learning rate after the warm-up: none, half a cosine to zero at the last step, linearly to "
        "zero over the second half of the steps, or (ramp) over all of them",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.99), strict=False, description="AdamW's decay of its averages of gradients and of their squares"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled: times the learning rate, at every step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a player's gradient")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are what is kept")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged into one step")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16: compute in bfloat16, weights stay float32; for GPUs that have it"
    )

    def learning_rate_at(self, step: int) -> float:
        """The rate of the 0-based `step`: a function of the step alone, so that resuming needs no state."""
        from math import cos, pi

        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        part = step / self.steps
        falls = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + cos(pi * part)),
            "linear": min(1.0, 2 - 2 * part),
            "ramp": 1 - part,
        }
        return self.learning_rate * warm * falls[self.decay]


class TrainingExecution(Execution):
    """How a stage that trains is carried out. Recorded in what it makes, and never a reason to make it again."""

    checkpoint_every: int = Field(
        250, ge=1, description="training steps between two checkpoints, of which the last two are kept"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: far less memory for about "
        "a third more time",
    )


def training_progress(checkpoints: Path) -> str | None:
    """The newest checkpoint below a folder, in words."""
    newest = max(checkpoints.rglob("step-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    phase = "" if newest.parent == checkpoints else f"{newest.parent.name}: "
    return f"{phase}checkpoint of step {int(newest.name.removeprefix('step-'))}"


@dataclass(frozen=True)
class Player:
    """A trainable module and how it is optimised."""

    module: nn.Module
    training: TrainingSettings
    averaged: bool = True
    """Whether an average (EMA) of its weights is kept: not of one that only serves another's training."""


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one player. `loss(batch)` gives the scalar loss and further figures to log."""

    player: str
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


class Method(Protocol):
    """Everything that the training loop needs to know. It never asks which method it runs."""

    @property
    def players(self) -> Mapping[str, Player]:
        """By name; a distillation method's result is its player `student`."""

    def turns(self, step: int) -> Sequence[Turn]:
        """Who is optimised in this step, in order. All turns of a step see the same batch."""

    def after_step(self, step: int) -> None:
        """Called when all turns of `step` are done: for targets that follow the players."""


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
        return loss.create(LossMaterials(self.teacher, below(self.inputs, field), below(self.contents, field)))

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
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(below(inputs, "loss")))
