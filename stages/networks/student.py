"""Students: a U-Net called once or a few times, and its export as a pipeline that plain diffusers runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.diffusion import few_step
from stages.diffusion.consistency import boundary
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.diffusion.guidance import embed
from stages.diffusion.prediction import StudentPrediction, both_to_x0, target, to_x0
from stages.networks.exporting import scheduler_of
from stages.networks.head import convert, fit
from stages.networks.network import NetworkTeacher

FILE = "student.json"
FIT_BATCH = 16


class Student(nn.Module):
    """A U-Net called at the points of a grid, from noise to x0. w (B,) is the guidance that it takes as an input.

    The grid may be finer than the steps: it is trained at all points, and sampled at every so many-th.
    """

    def __init__(self, unet: Any, grid: Grid, form: Form) -> None:
        super().__init__()
        assert form.prediction, "resolved by from_teacher, and stated in student.json"
        self.unet: Any = unet
        self.grid, self.form = grid, form
        self.prediction: StudentPrediction = form.prediction
        self.timesteps: Tensor
        self.alpha: Tensor
        self.sigma: Tensor
        for name in ("timesteps", "alpha", "sigma"):
            values = torch.from_numpy(getattr(grid, name))
            self.register_buffer(name, values.float() if name == "timesteps" else values, persistent=False)

    @classmethod
    def from_teacher(cls, teacher: NetworkTeacher, form: Form, steps: int | None = None) -> Student:
        """With the teacher's weights, and its prediction type if the form names none; at first the output does not
        depend on w. `steps`: of the grid, a multiple of the form's. Where the two prediction types differ, the last
        layer begins as `head.FACTORS` says.

        Raises ValueError for more steps than the schedule has, and for a student of epsilon on a schedule that ends in
        pure noise."""
        if form.prediction is None:
            form = form.model_copy(update={"prediction": teacher.prediction})
        grid = Grid.of(form.schedule, teacher.schedule, steps or form.steps)
        if form.prediction == "epsilon" and grid.alpha[-1] == 0:
            raise ValueError(
                "the schedule ends in pure noise, where epsilon says nothing of x0: give another prediction"
            )
        assert form.prediction
        unet = convert(copy.deepcopy(teacher.unet).requires_grad_(True), teacher.prediction, form.prediction)
        if form.w_range:
            unet = teacher.with_guidance_embedding(unet)
        return cls(unet, grid, form)

    @classmethod
    def load(cls, folder: Path, teacher: NetworkTeacher, steps: int | None = None) -> Student:
        """The student exported to `folder`, frozen, on its teacher's device; to be sampled in `steps` where they are
        given, and not in its own."""
        about = _about(folder)
        form = Form.model_validate(about if steps is None else {**about, "steps": steps})
        unet = teacher.UNET.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        student = cls(unet, Grid.of(form.schedule, teacher.schedule, form.steps), form)
        return student.to(teacher.device).eval().requires_grad_(False)

    @torch.no_grad()
    def fit_head(self, noise: Tensor, x0: Tensor, condition: Tensor | None) -> None:
        """Fit the last layer so that one call leads from noise (B, C, H, W) to x0 (B, C, H, W): see `head.fit`."""
        assert self.prediction != "both"
        point = self.grid.steps
        alpha, sigma = self.level(point, noise)
        wanted = target(self.prediction, x0, (noise - alpha * x0) / sigma, alpha, sigma)
        features: list[Tensor] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(noise), FIT_BATCH):
                rows = slice(start, start + FIT_BATCH)
                self._output(noise[rows], point, None if condition is None else condition[rows], None)
                yield features.pop(), wanted[rows]

        with self.unet.conv_out.register_forward_pre_hook(lambda _layer, given: features.append(given[0])):
            fit(self.unet.conv_out, batches())

    def go_on_from(self, folder: Path) -> None:
        """Take the weights of the student exported to `folder`, but for a guidance embedding that only its export
        added. Raises ValueError if its prediction type is another."""
        there = Form.model_validate(_about(folder)).prediction
        if there != self.prediction:
            raise ValueError(f"the student to go on from predicts {there}, this one {self.prediction}")
        weights = load_file(folder / "unet" / SAFETENSORS_WEIGHTS_NAME)
        self.unet.load_state_dict({name: weights[name] for name in self.unet.state_dict()})

    def forward(
        self,
        noise: Tensor,
        condition: Tensor | None,
        w: Tensor | None = None,
        generator: few_step.Generators = None,
    ) -> Tensor:
        """noise (B, C, H, W), condition as the teacher's `encode_prompts` gives it -> x0 (B, C, H, W), in `form.steps`
        calls. `generator`: as `few_step.sample` takes it, for samplers that draw more noise."""
        stride = self.grid.steps // self.form.steps

        def denoise(z: Tensor, i: int) -> Tensor:
            return self.x0(z, i * stride, condition, w)

        return few_step.sample(self.form.sampler, denoise, noise, self.grid.subsample(stride), generator)

    def x0(self, z: Tensor, i: int | Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor:
        """x0 (B, C, H, W) as estimated from z (B, C, H, W) at point i, or at points i (B,)."""
        output = self._output(z, i, condition, w)
        alpha, sigma = self.level(i, z)
        if self.prediction == "both":
            of_x0, of_noise = output.chunk(2, 1)
            x0: Tensor = both_to_x0(of_x0, of_noise, z, alpha, sigma)
        else:
            x0 = to_x0(self.prediction, output, z, alpha, sigma)
        if self.form.sampler != "consistency":
            return x0
        skip, out = (column(factor, z) for factor in boundary(self.timesteps[i]))
        return skip * z + out * x0

    def error(self, z: Tensor, i: Tensor, x0: Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor:
        """Squared error (B,) of the estimate to `x0`, averaged over elements. That of v is compared with what v would
        be, in float64: where there is hardly any noise, estimates of x0 differ by less than float32 resolves."""
        if self.prediction != "v_prediction":
            return (self.x0(z, i, condition, w) - x0.to(z.dtype)).square().mean((1, 2, 3))
        alpha, sigma = self.level(i, x0.double())
        wanted = target("v_prediction", x0, (z - alpha * x0) / sigma, alpha, sigma)
        error = self._output(z, i, condition, w) - wanted.to(z.dtype)
        return self.sigma[i].to(z.dtype) ** 2 * error.square().mean((1, 2, 3))

    def noised(self, x0: Tensor, noise: Tensor, i: Tensor) -> Tensor:
        """z (B, C, H, W) at points i (B,): noise alone at the last."""
        alpha, sigma = self.level(i, x0)
        return torch.where(column(i, i) == self.grid.steps, noise, alpha * x0 + sigma * noise)

    def level(self, i: int | Tensor, z: Tensor) -> tuple[Any, Any]:
        """(alpha, sigma) at point i, or at each of points i (B,), in z's dtype."""
        if isinstance(i, int):
            return self.grid.level(i)
        return column(self.alpha[i], z), column(self.sigma[i], z)

    def _output(self, z: Tensor, i: int | Tensor, condition: Tensor | None, w: Tensor | None) -> Tensor:
        if condition is not None and condition.is_floating_point():
            condition = condition.to(z.dtype)
        if self.form.w_range is None:
            output: Tensor = self.unet(z, self.timesteps[i], condition).sample
            return output
        if w is None:
            raise ValueError("this student takes the strength of guidance as an input: give w")
        embedding = embed(w, self.unet.config["time_cond_proj_dim"]).to(z.dtype)
        guided: Tensor = self.unet(z, self.timesteps[i], condition, timestep_cond=embedding).sample
        return guided


def _about(folder: Path) -> dict[str, Any]:
    """The form of the student exported to `folder`, as its student.json states it."""
    about: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    del about["timesteps"]
    return about


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), or one for all, so that they multiply (B, C, H, W) of `like`'s dtype."""
    return values.to(like.dtype).view(-1, 1, 1, 1)


def export(student: Student, teacher: NetworkTeacher, folder: Path, card: str) -> None:
    """Write a folder that plain `DiffusionPipeline.from_pretrained(folder)` runs in the student's steps, where
    diffusers has what it takes: see `plain`."""
    form = student.form
    grid = Grid.of(form.schedule, teacher.schedule, form.steps)
    teacher.save_pipeline(student.unet, scheduler_of(form, grid, teacher.folder), folder)
    timesteps = [int(t) if t.is_integer() else float(t) for t in grid.timesteps[:0:-1]]
    about = {**form.model_dump(mode="json"), "timesteps": timesteps}
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
