"""The base classes of methods' settings, and `Materials`, from which a method is created."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Choice, Config, Neutral, StageError, values_under
from stages.diffusion.config import Scale
from stages.diffusion.form import Form
from stages.diffusion.prediction import Prediction
from stages.losses.config import LOSSES, LossConfig, LossMaterials
from stages.networks.lora import LoraSettings
from stages.training import Batch, Method, TrainingSettings

if TYPE_CHECKING:
    from stages.losses.config import Distance
    from stages.networks.adapter import Adapter
    from stages.networks.denoiser import Denoiser
    from stages.networks.student import Student

Stream = Literal["pairs", "latents", "prompts"]
"""The data streams that a method can be trained on, with the entries of a batch. pairs: `noise` and `latent`
(B, C, H, W), `prompts` (B strings) and `w` (B,), the guidance scale - 1. latents: `latent`, of real images, and
`prompts`. prompts: `prompts`."""
OneStepPrediction = Literal["v_prediction", "epsilon", "flow_prediction"]


class StudentTraining(TrainingSettings):
    """How a student is trained. With `lora`, only its LoRA weights are trained."""

    lora: Annotated[LoraSettings | None, Neutral()] = Field(
        None,
        description="train LoRA weights and freeze those of the teacher; {} for the default settings; default: train "
        "all weights",
    )

    def lora_error(self, form: Form, teacher: Prediction) -> str | None:
        """Return why a student of `form` cannot have LoRA weights if its teacher predicts `teacher`, or None if it
        can."""
        if self.lora is None or form.prediction in (None, teacher):
            return None
        return (
            f"a LoRA student keeps its teacher's prediction type, {teacher}, but the method has prediction: "
            f"{form.prediction}; set the method's prediction to {teacher} if it can have it, or leave lora out"
        )


@dataclass(frozen=True)
class Materials:
    """The inputs of a method: the teacher, the training settings, and the artifacts that it reads."""

    teacher: Adapter
    """The frozen teacher. A method must not change it. A method that no longer needs its network calls
    `teacher.release()`, which moves the network to the CPU."""
    training: StudentTraining
    start: Artifact | None = None
    """The student that gives the initial weights. None: the teacher gives them."""
    guidance_scale: Scale = 1.0
    """The guidance scale that the student learns if its form gives none. If it is a range, the student takes w as an
    input."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    """Dotted path of a field in the method's settings -> the sealed artifact that it names."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """Dotted path of a `Content` field in the method's settings -> identity of its content."""
    examples: Callable[[], Batch] | None = None
    """Returns a batch of a few hundred training pairs. None if there are none."""
    origin: Adapter | None = None
    """The pipeline whose network gives the initial weights, if there is no `start`. None: the teacher."""
    seed: int = 0
    """The seed of training, for draws that depend on the step only. Other draws use torch's global generator."""

    def distance(self, loss: LossConfig, field: str = "loss") -> Distance:
        """Create the distance from its settings `loss`. `field` is the field of the method that holds them."""
        return loss.create(
            LossMaterials(self.teacher, values_under(self.inputs, field), values_under(self.contents, field))
        )

    def one_step_student(self, prediction: OneStepPrediction) -> Student:
        """Create a one-step student with the weights of `start`, or of the teacher.

        If the teacher's last layer cannot be converted to the student's prediction type, the student's last layer is
        fitted to a few hundred training pairs. Raises StageError for the same reasons as `student`, and if features or
        pairs are not finite."""
        from stages.networks.head import begins_at_zero

        student = self.student(Form(prediction=prediction))
        initial = (self.origin or self.teacher).prediction
        if self.examples and self.start is None and begins_at_zero(initial, prediction):
            pairs = self.examples()
            try:
                student.fit_head(pairs["noise"], pairs["latent"], student.encode(pairs["prompts"]), pairs["w"])
            except ValueError as error:
                raise StageError(str(error)) from None
        return student

    def student(self, form: Form, grid_steps: int | None = None) -> Student:
        """Create a student of the given form, with the weights of `start`, of `origin`, or of the teacher.

        If the form gives no guidance, it is that of these materials. The student is trained at `grid_steps` points of
        time, a multiple of its steps. None: as many as its steps. Raises StageError if the teacher's schedule has too
        few timesteps, if `start` has another prediction type, or if the student predicts epsilon and the schedule ends
        in pure noise."""
        from stages.networks.student import Student

        if form.guidance_scale is None and isinstance(self.guidance_scale, tuple):
            least, most = self.guidance_scale
            form = form.model_copy(update={"w_range": (least - 1, most - 1)})
        try:
            if self.start is not None:
                return Student.from_student(self.start.folder, self.teacher, form, grid_steps, self.training.lora)
            return Student.from_teacher(self.teacher, form, grid_steps, self.origin, self.training.lora)
        except ValueError as error:
            raise StageError(str(error)) from None

    def teacher_denoiser(self, form: Form) -> Denoiser:
        """Return the teacher as a denoiser on the time grid of `form`.

        The guidance scale is that of `form`, or else that of these materials. If it is a range, `x0` needs w. Raises
        StageError if the teacher's schedule has too few timesteps."""
        from stages.diffusion.grid import Grid
        from stages.networks.denoiser import TeacherDenoiser

        try:
            grid = Grid.of(form, self.teacher.schedule)
        except ValueError as error:
            raise StageError(str(error)) from None
        scale = form.guidance_scale or self.guidance_scale
        return TeacherDenoiser(self.teacher, grid, 1.0 if isinstance(scale, tuple) else scale)

    def previous_student(self) -> Student | None:
        """Return the student of the previous round, frozen, or None if there is no `start`.

        That student is the teacher of this round. The network of the original teacher is moved to the CPU."""
        from stages.networks.student import Student

        if self.start is None:
            return None
        self.teacher.release()
        return Student.load(self.start.folder, self.teacher)


@dataclass(frozen=True)
class Round:
    """One round of a method that distils in several rounds. Each round is a stage."""

    steps: int
    """The student's number of steps. It becomes the label of the stage: 16 in student/16."""
    method: dict[str, Any]
    """The method's settings for this round, unvalidated, in the form that they have in a manifest."""
    training_steps: Any = None
    """The value of `training.steps` for this round. None: the manifest's value."""


class MethodConfig(Config):
    """Base class of the settings of distillation methods."""

    DATA: ClassVar[tuple[frozenset[Stream], ...]] = (frozenset({"pairs"}),)
    """The combinations of data streams that the method can be trained on. A batch has all streams of one of them."""
    LEARNS_RANGE: ClassVar[bool] = False
    """Whether the student can be trained on pairs with a range of guidance scales. It then takes the `w` of each pair
    as an input."""
    name: str

    @classmethod
    def rounds(cls, settings: Mapping[str, Any], has_start: bool) -> list[Round]:
        """Return the rounds that these unvalidated settings describe, in order. `has_start`: `start_from` is set.

        Each round starts from the student of the round before. The result is empty if the method has no rounds or if
        the settings are invalid. Validation reports errors later."""
        return []

    @property
    def form(self) -> Form:
        """The form of the student: its steps, noise levels, prediction type, sampler and guidance."""
        return Form()

    @property
    def uses_guidance(self) -> bool:
        """Whether training guides the teacher, and so calls it both with and without a prompt."""
        return self.form.w_range is not None or (self.form.guidance_scale or 1.0) > 1.0

    @property
    def has_discriminator(self) -> bool:
        """Whether training needs intermediate features of the teacher's network, for a discriminator."""
        return False

    @property
    def learns_pairs(self) -> bool:
        """Whether the student learns the map of stored pairs, from the noise to the latent."""
        return all("pairs" in streams for streams in self.DATA)

    def warnings(self, pairs_scales: Sequence[Scale]) -> Iterator[str]:
        """Yield warnings for the user. `pairs_scales`: the different guidance scales of the pairs."""
        yield from ()

    def step_count_error(self, steps: int) -> str | None:
        """Return why the student cannot be sampled in `steps` steps, or None if it can."""
        return None if steps == self.form.steps else f"the student's steps are {self.form.steps}, not {steps}"

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit `inputs`, the artifacts that fields name."""
        yield from ()

    def check_training(self, streams: Collection[Stream], steps: int) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit `streams`, which are in DATA, or the number of
        training steps."""
        yield from ()

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit the method of the `start_from` student.

        `start` is that method. It is None if training starts from the teacher's weights."""
        if start is not None:
            yield from form_mismatches(start.form, self.form)

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit a teacher of `count` timesteps."""
        yield from ()

    def check_prediction(self, teacher: Prediction, from_teacher: bool) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit the prediction type of the initial network.

        `teacher` is that type. `from_teacher` is False if training starts from the student in `start_from`. Then the
        type is the teacher's."""
        yield from ()

    def create(self, materials: Materials) -> Method:
        """Create the method. Only this method, and the code that it calls, may import torch."""
        raise TypeError(f"{type(self).__name__} does not implement create()")


def prompts_of(batch: Batch) -> list[str]:
    """Return the prompts to sample from: those of the stream `prompts`, or else of `latents`, or else of `pairs`."""
    found: list[str] = next(batch[stream] for stream in ("prompts", "latents", "pairs") if stream in batch)["prompts"]
    return found


def images_of(batch: Batch) -> Mapping[str, Any]:
    """Return the batch of `latents`, or else of `pairs`. The method adds noise to its latents."""
    found: Mapping[str, Any] = batch["latents" if "latents" in batch else "pairs"]
    return found


def form_mismatches(start: Form, own: Form, ignore: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (field, problem) for each field in which the form of the `start_from` student differs from `own`.

    Fields in `ignore` are not compared. The guidance scale is not compared either, because it may come from the pairs.
    `Distill.check` compares it."""
    for name in Form.model_fields:
        old, new = getattr(start, name), getattr(own, name)
        unknown = name == "prediction" and None in (old, new)  # the teacher's type; compared when training starts
        if name not in (*ignore, "guidance_scale") and not unknown and old != new:
            yield name, f"the student in start_from has {name}: {old}, this one has {name}: {new}"


class OneStepConfig(MethodConfig):
    """Base class of methods whose student maps a stored noise to its stored latent in one network call."""

    loss: Annotated[LossConfig, Choice("name", LOSSES)] = Field(
        description="distance between the student's output and the teacher's"
    )
    prediction: OneStepPrediction = Field(
        "v_prediction",
        description="what the student predicts; epsilon amplifies errors at the noisiest timestep, v does not; if a v "
        "student has an epsilon teacher, its last layer is first fitted to a few hundred pairs by ridge regression",
    )

    @property
    def form(self) -> Form:
        return Form(prediction=self.prediction)

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(values_under(inputs, "loss")))
