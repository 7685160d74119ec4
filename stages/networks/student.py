"""Students: networks that sample in one or a few calls, and their export as diffusers pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.diffusion import few_step
from stages.diffusion.consistency import boundary
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.diffusion.prediction import StudentPrediction, both_to_x0, power, target, to_x0
from stages.diffusion.schedule import Level
from stages.networks.adapter import Adapter
from stages.networks.condition import Condition
from stages.networks.head import convert, fit
from stages.networks.lora import LoraSettings, load_lora, merge_lora, save_lora

FILE = "student.json"
FIT_BATCH = 16


class Student(nn.Module):
    """A network that estimates x0 at the points of a time grid, and samples in `form.steps` calls.

    The student is trained at all points of `grid`. The grid's number of steps is a multiple of `form.steps`. Sampling
    uses every (grid.steps / form.steps)-th point.

    In all methods, z and noise are (B, C, H, W), and i is a point of the grid, from 1 (nearly clean) to N (noise).
    `condition` has B rows and was made by `encode`. w (B,) is guidance_scale - 1. Students with `form.w_range` require
    it, and others ignore it.
    """

    def __init__(
        self, adapter: Adapter, network: Any, grid: Grid, form: Form, lora: LoraSettings | None = None
    ) -> None:
        """`lora`: the settings of the network's LoRA weights, if it has them."""
        super().__init__()
        assert form.prediction, "resolved by from_teacher, and stated in student.json"
        self.adapter, self.network = adapter, network
        self.grid, self.form, self.lora = grid, form, lora
        self.prediction: StudentPrediction = form.prediction
        self.dtype: torch.dtype | None = None
        """The dtype in which the network computes. Its inputs and outputs are cast. None: the dtype of z."""
        self.timesteps: Tensor
        self.alpha: Tensor
        self.sigma: Tensor
        for name in ("timesteps", "alpha", "sigma"):
            values = torch.from_numpy(getattr(grid, name))
            self.register_buffer(name, values.float() if name == "timesteps" else values, persistent=False)

    @classmethod
    def from_teacher(
        cls,
        teacher: Adapter,
        form: Form,
        steps: int | None = None,
        origin: Adapter | None = None,
        lora: LoraSettings | None = None,
    ) -> Student:
        """Create a student with the weights of `origin`, by default the teacher. With `lora`, these weights are frozen.
        If the teacher has several networks, it takes the one that is called at the student's noisiest timestep.

        If `form.prediction` is None, the student has the prediction type of `origin`. If its type differs, the last
        layer is initialised as `head.FACTORS` says. If the student takes w, its output does not depend on w at first.
        `steps` is the number of steps of the grid, a multiple of `form.steps`, and by default equal to it.

        Raises ValueError if the teacher's schedule has too few timesteps, or if the student predicts epsilon and the
        schedule ends in pure noise."""
        form, grid = _resolved(form, (origin or teacher).prediction, teacher, steps)
        assert form.prediction
        called = teacher.at(grid.timesteps[-1])
        origin, teacher = called if origin in (None, teacher) else origin, called
        assert origin
        if lora:
            assert origin is teacher and form.prediction == teacher.prediction, "as Distill.check demands"
            return cls(teacher, teacher.lora_network(lora, form.w_range is not None), grid, form, lora)
        network = convert(origin.student_network(), origin.HEAD, origin.prediction, form.prediction)
        if form.w_range:
            network = teacher.with_guidance_embedding(network)
        return cls(teacher, network, grid, form)

    @classmethod
    def from_student(
        cls, folder: Path, teacher: Adapter, form: Form, steps: int | None = None, lora: LoraSettings | None = None
    ) -> Student:
        """Create a student with the network of the student that was exported to `folder`, which may have any size.

        With `lora`, that student has LoRA weights of the same settings, and they are trained further. Otherwise all of
        its weights are trained.

        `form` and `steps` are as in `from_teacher`. Raises ValueError in the same cases, and if the student in `folder`
        has another prediction type."""
        form, grid = _resolved(form, teacher.prediction, teacher, steps)
        old = stored(folder)[0].prediction
        if old != form.prediction:
            raise ValueError(f"the student in start_from predicts {old}, this one predicts {form.prediction}")
        teacher = teacher.at(grid.timesteps[-1])
        network = _with_lora(folder, teacher, form, lora) if lora else whole_network(folder, teacher)
        return cls(teacher, network.to(teacher.device), grid, form, lora)

    @classmethod
    def load(cls, folder: Path, teacher: Adapter, steps: int | None = None) -> Student:
        """Load the student that was exported to `folder`, frozen, to the device of its teacher.

        `steps` replaces the number of sampling steps in its student.json."""
        form, lora = stored(folder)
        form = form if steps is None else Form.model_validate({**form.model_dump(), "steps": steps})
        grid = Grid.of(form, teacher.schedule)
        teacher = teacher.at(grid.timesteps[-1])
        network = _with_lora(folder, teacher, form, lora) if lora else teacher.load_network(folder)
        student = cls(teacher, network, grid, form, lora)
        return student.to(teacher.device).eval().requires_grad_(False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the network to `dtype`. The dtype of z and x0 stays that of the noise."""
        self.dtype = dtype
        self.network.to(dtype)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the network's condition for `prompts`, one row for each prompt."""
        return self.adapter.encode_prompts(prompts)

    @torch.no_grad()
    def fit_head(self, noise: Tensor, x0: Tensor, condition: Condition, w: Tensor) -> None:
        """Fit the last layer so that one call maps noise (B, C, H, W) to x0 (B, C, H, W), by `head.fit`.

        The student must not predict `both`. Raises ValueError if values are not finite."""
        assert self.prediction != "both"
        point = self.grid.steps
        alpha, sigma = self.level(point, noise)
        wanted = target(self.prediction, x0, (noise - alpha * x0) / sigma, alpha, sigma)
        head = self.network.get_submodule(self.adapter.HEAD)
        features: list[Tensor] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(noise), FIT_BATCH):
                rows = slice(start, start + FIT_BATCH)
                self._output(noise[rows], point, condition.select(rows), w[rows])
                yield features.pop(), wanted[rows]

        with head.register_forward_pre_hook(lambda _layer, given: features.append(given[0])):
            fit(head, batches())

    def forward(
        self,
        noise: Tensor,
        condition: Condition,
        w: Tensor | None = None,
        generator: few_step.Generators = None,
    ) -> Tensor:
        """Sample x0 (B, C, H, W) from noise (B, C, H, W) in `form.steps` network calls.

        `generator` is used by samplers that draw more noise: see `few_step.states`."""
        *_, (_, _, x0) = self.states(noise, condition, w, generator)
        return x0

    def states(
        self,
        noise: Tensor,
        condition: Condition,
        w: Tensor | None = None,
        generator: few_step.Generators = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (k, z, x0) at each network call of sampling. The last x0 is the sample.

        k counts down from `form.steps` to 1. It is a point of the sampling grid, which has `form.steps` steps."""
        stride = self.grid.steps // self.form.steps

        def denoise(z: Tensor, i: int) -> Tensor:
            return self.x0(z, i * stride, condition, w)

        return few_step.states(self.form.sampler, denoise, noise, self.grid.subsample(stride), generator)

    def x0(self, z: Tensor, i: int | Tensor, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Estimate x0 (B, C, H, W) from z (B, C, H, W) at point i, or at points i (B,)."""
        output = self._output(z, i, condition, w)
        alpha, sigma = self.level(i, z)
        if self.prediction == "both":
            of_x0, of_noise = output.chunk(2, 1)
            x0: Tensor = both_to_x0(of_x0, of_noise, z, alpha, sigma)
        elif self.prediction == "epsilon":  # it is divided by alpha, which is small at the noisiest levels
            x0 = to_x0("epsilon", output.double(), z.double(), *self.level(i, z.double())).to(z.dtype)
        else:
            x0 = to_x0(self.prediction, output, z, alpha, sigma)
        if self.form.boundary == "none":
            return x0
        skip, out = (column(factor, z) for factor in boundary(self.timesteps[i]))
        return skip * z + out * x0

    def error(self, z: Tensor, i: Tensor, x0: Tensor, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Return the squared error (B,) of the estimate from z at points i (B,) against `x0`, averaged over elements.

        For v and flow prediction, the error of the network's output is computed and converted to an error of x0. The
        target output is computed in float64. Near clean data, differences of x0 are below the precision of float32."""
        if self.prediction not in ("v_prediction", "flow_prediction"):
            return (self.x0(z, i, condition, w) - x0.to(z.dtype)).square().mean((1, 2, 3))
        level = self.level(i, x0.double())
        wanted = target(self.prediction, x0, (z - level.alpha * x0) / level.sigma, *level)
        error = self._output(z, i, condition, w) - wanted.to(z.dtype)
        scale = self.sigma[i] / (
            power(self.alpha[i], self.sigma[i]) if self.prediction == "v_prediction" else self.alpha[i] + self.sigma[i]
        )
        return scale.to(z.dtype) ** 2 * error.square().mean((1, 2, 3))

    def noised(self, x0: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        """Return z = alpha x0 + sigma noise (B, C, H, W) at points i (B,). At point N, z is the noise alone."""
        alpha, sigma = self.level(i, x0)
        return torch.where(column(i, i) == self.grid.steps, noise, alpha * x0 + sigma * noise)

    def level(self, i: int | Tensor, z: Tensor) -> Level:
        """Return the level at point i, as numbers, or at points i (B,), as tensors (B, 1, 1, 1) of z's dtype.

        The timestep at points i is (B,)."""
        if isinstance(i, int):
            return self.grid.level(i)
        return Level(column(self.alpha[i], z), column(self.sigma[i], z), self.timesteps[i])

    def _output(self, z: Tensor, i: int | Tensor, condition: Condition, w: Tensor | None) -> Tensor:
        if self.form.w_range is not None and w is None:
            raise ValueError("this student takes the guidance strength as an input: give w")
        level = self.level(i, z)
        if isinstance(i, int):
            level = Level(level.alpha, level.sigma, self.timesteps[i])
        given = z if self.dtype is None else z.to(self.dtype)
        output = self.adapter.predict(self.network, given, level, condition, w if self.form.w_range else None)
        return output if self.dtype is None else output.to(z.dtype)


def _resolved(form: Form, prediction: StudentPrediction, teacher: Adapter, steps: int | None) -> tuple[Form, Grid]:
    """Return the form with a prediction type, by default `prediction`, and the student's grid. Raises ValueError."""
    form = form.model_copy(update={"prediction": form.prediction or prediction})
    grid = Grid.of(form, teacher.schedule, steps)
    if form.prediction == "epsilon" and grid.alpha[-1] == 0:
        raise ValueError(
            "the schedule ends in pure noise, where x0 cannot be computed from epsilon: give another prediction"
        )
    return form, grid


def stored(folder: Path) -> tuple[Form, LoraSettings | None]:
    """Return the form in the student.json of `folder`, and the settings of its LoRA weights if it has them."""
    about: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    lora = about.pop("lora", None)
    del about["timesteps"]
    return Form.model_validate(about), lora and LoraSettings.model_validate(lora)


def _with_lora(folder: Path, teacher: Adapter, form: Form, settings: LoraSettings) -> Any:
    """Return the teacher's network with the LoRA weights of the student in `folder`. They are trainable."""
    network = teacher.lora_network(settings, form.w_range is not None)
    load_lora(network, settings, teacher.NETWORK, folder)
    return network


def whole_network(folder: Path, teacher: Adapter) -> Any:
    """Load the network of the student in `folder`, trainable, to the CPU. LoRA weights are added to the teacher's."""
    form, settings = stored(folder)
    if settings is None:
        return teacher.load_network(folder)
    network = teacher.load_network(teacher.folder)
    if form.w_range:
        network = teacher.with_guidance_embedding(network)
    merge_lora(network, teacher.NETWORK, folder)
    return network


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) or () as (B, 1, 1, 1) or (1, 1, 1, 1), in the dtype of `like`."""
    return values.to(like.dtype).view(-1, 1, 1, 1)


def export(student: Student, folder: Path, card: str) -> None:
    """Write the student to `folder` as a diffusers pipeline, with student.json and `card` as README.md.

    `DiffusionPipeline.from_pretrained(folder)` samples it in its steps, unless `Adapter.plain_error` says why not.

    If the student has LoRA weights, only these and the scheduler are written. `load_lora_weights(folder)` adds them to
    the teacher's pipeline, unless `Adapter.plain_lora_error` says why not. With `merged`, a pipeline is also written.
    """
    form, adapter, settings = student.form, student.adapter, student.lora
    grid = Grid.of(form, adapter.schedule)
    scheduler = adapter.student_scheduler(form, grid)
    timesteps = [int(t) if t.is_integer() else float(t) for t in grid.timesteps[:0:-1]]
    about = {**form.model_dump(mode="json"), "timesteps": timesteps}
    folder.mkdir(exist_ok=True)
    if settings:
        about["lora"] = settings.model_dump(mode="json")
        save_lora(student.network, settings, adapter.network, adapter.NETWORK, folder)
        scheduler.save_pretrained(folder / "scheduler")
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    if settings is None or settings.merged:
        network = whole_network(folder, adapter) if settings else student.network
        adapter.save_pipeline(network, scheduler, folder)
        _forget_paths(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _forget_paths(pipeline: Path) -> None:
    """Remove the paths of this machine from the configs in the folder of a pipeline."""
    for file in pipeline.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
