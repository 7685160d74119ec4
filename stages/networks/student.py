"""Students: a U-Net called once or a few times, and its export as a pipeline that plain diffusers runs."""

from __future__ import annotations

import copy
import json
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
from stages.diffusion.prediction import both_to_x0, target, to_x0
from stages.networks.exporting import scheduler_of
from stages.networks.network import NetworkTeacher

FILE = "student.json"

HEAD = {
    ("v_prediction", "sample"): (-1.0,),
    ("v_prediction", "both"): (-1.0, 1.0),
    ("epsilon", "sample"): (0.0,),
    ("epsilon", "both"): (0.0, 1.0),
    ("sample", "v_prediction"): (-1.0,),
    ("sample", "epsilon"): (0.0,),
    ("sample", "both"): (1.0, 0.0),
}
"""(what a teacher puts out, what its student is to) -> what the last layer's weights are multiplied by, for each thing
that the student puts out. v is -x0 where there is only noise, and the noise where there is none. A teacher of the noise
says nothing of x0, nor one of x0 of the noise: that begins at 0, its last layer untrained. Others: 1."""


class Student(nn.Module):
    """A U-Net called at the points of a grid, from noise to x0. w (B,) is the guidance that it takes as an input.

    The grid may be finer than the steps: it is trained at all points, and sampled at every so many-th.
    """

    def __init__(self, unet: Any, grid: Grid, form: Form) -> None:
        super().__init__()
        self.unet: Any = unet
        self.grid, self.form = grid, form
        self.timesteps: Tensor
        self.alpha: Tensor
        self.sigma: Tensor
        for name in ("timesteps", "alpha", "sigma"):
            values = torch.from_numpy(getattr(grid, name))
            self.register_buffer(name, values.float() if name == "timesteps" else values, persistent=False)

    @classmethod
    def from_teacher(cls, teacher: NetworkTeacher, form: Form, steps: int | None = None) -> Student:
        """With the teacher's weights, and at first indifferent to w. `steps`: of the grid, a multiple of the form's.

        What the teacher says nothing of begins with a last layer of zeros: see HEAD."""
        unet = copy.deepcopy(teacher.unet).requires_grad_(True)
        factors = HEAD.get((teacher.prediction, form.prediction), (1.0,))
        if factors != (1.0,):
            unet = _with_head(unet, factors)
        if form.w_range:
            unet = teacher.with_guidance_embedding(unet)
        return cls(unet, Grid.of(form.schedule, teacher.schedule, steps or form.steps), form)

    @classmethod
    def load(cls, folder: Path, teacher: NetworkTeacher, steps: int | None = None) -> Student:
        """The student exported to `folder`, frozen, on its teacher's device; to be sampled in `steps` where they are
        given, and not in its own."""
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        del about["timesteps"]
        form = Form.model_validate(about if steps is None else {**about, "steps": steps})
        unet = teacher.UNET.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        student = cls(unet, Grid.of(form.schedule, teacher.schedule, form.steps), form)
        return student.to(teacher.device).eval().requires_grad_(False)

    def copy_weights(self, folder: Path) -> None:
        """Take those of the student exported to `folder`, but for a guidance embedding that only its export added."""
        weights = load_file(folder / "unet" / SAFETENSORS_WEIGHTS_NAME)
        self.unet.load_state_dict({name: weights[name] for name in self.unet.state_dict()})

    def forward(
        self,
        noise: Tensor,
        condition: Tensor | None,
        w: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """noise (B, C, H, W), condition as the teacher's `encode_prompts` gives it -> x0 (B, C, H, W), in `form.steps`
        calls. `generator` is for samplers that draw more noise."""
        stride = self.grid.steps // self.form.steps

        def denoise(z: Tensor, i: int) -> Tensor:
            return self.x0(z, i * stride, condition, w)

        return few_step.sample(self.form.sampler, denoise, noise, self.grid.every(stride), generator)

    def x0(self, z: Tensor, i: int | Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor:
        """x0 (B, C, H, W) as estimated from z (B, C, H, W) at point i, or at points i (B,)."""
        output = self._output(z, i, condition, w)
        alpha, sigma = self.level(i, z)
        if self.form.prediction == "both":
            of_x0, of_noise = output.chunk(2, 1)
            x0: Tensor = both_to_x0(of_x0, of_noise, z, alpha, sigma)
        else:
            x0 = to_x0(self.form.prediction, output, z, alpha, sigma)
        if self.form.sampler != "consistency":
            return x0
        skip, out = (column(factor, z) for factor in boundary(self.timesteps[i]))
        return skip * z + out * x0

    def error(self, z: Tensor, i: Tensor, x0: Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor:
        """Squared error (B,) of the estimate to `x0`, averaged over elements. That of v is compared with what v would
        be, in float64: where there is hardly any noise, estimates of x0 differ by less than float32 resolves."""
        if self.form.prediction != "v_prediction":
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


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,), or one for all, so that they multiply (B, C, H, W) of `like`'s dtype."""
    return values.to(like.dtype).view(-1, 1, 1, 1)


def _with_head(unet: Any, factors: tuple[float, ...]) -> Any:
    """With its last layer once for each factor, multiplied by it."""
    config = {**unet.config, "out_channels": unet.config["out_channels"] * len(factors)}
    wide = type(unet).from_config(config).to(next(unet.parameters()).device)
    weights = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([factor * weights[name] for factor in factors])
    wide.load_state_dict(weights)
    return wide


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
