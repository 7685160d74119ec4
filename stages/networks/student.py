"""One-step students: a U-Net called once, and its export as a pipeline that plain diffusers runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.diffusion.prediction import Prediction, to_x0
from stages.diffusion.schedule import NoiseSchedule
from stages.networks.network import NetworkTeacher

FILE = "student.json"


class OneStepStudent(nn.Module):
    """x0 = G(noise, condition): one call of the U-Net at timestep `t`, read as `prediction`."""

    def __init__(self, unet: Any, schedule: NoiseSchedule, t: int, prediction: Prediction) -> None:
        super().__init__()
        self.unet: Any = unet
        self.prediction = prediction
        self.t: Tensor
        self.register_buffer("t", torch.tensor(t), persistent=False)
        self.alpha, self.sigma = schedule.at(t)

    @classmethod
    def from_teacher(cls, teacher: NetworkTeacher, t: int, prediction: Prediction) -> OneStepStudent:
        unet = copy.deepcopy(teacher.unet).requires_grad_(True)
        return cls(unet, teacher.schedule, t, prediction)

    @classmethod
    def load(cls, folder: Path, teacher: NetworkTeacher) -> OneStepStudent:
        """The student exported to `folder`, on its teacher's device."""
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        unet = teacher.UNET.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        student = cls(unet, teacher.schedule, about["timesteps"][0], about["prediction"])
        return student.to(teacher.device).eval().requires_grad_(False)

    def copy_weights(self, folder: Path) -> None:
        """Take those of the student exported to `folder`, but for the guidance embedding that its export added."""
        weights = load_file(folder / "unet" / SAFETENSORS_WEIGHTS_NAME)
        self.unet.load_state_dict({name: weights[name] for name in self.unet.state_dict()})

    def forward(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        """noise (B, C, H, W), condition as the teacher's `encode_prompts` gives it -> x0 (B, C, H, W)."""
        if condition is not None and condition.is_floating_point():
            condition = condition.to(noise.dtype)
        output = self.unet(noise, self.t, condition).sample
        return to_x0(self.prediction, output, noise, self.alpha, self.sigma)


def export(student: OneStepStudent, teacher: NetworkTeacher, folder: Path, card: str) -> None:
    """Write a folder that plain `DiffusionPipeline.from_pretrained(folder)` runs in one step.

    The scheduler's trailing grid calls t = T - 1 and returns x0 exactly. Raises ValueError if the student was
    trained at another timestep, for which plain diffusers has no one-step grid.
    """
    t = int(student.t)
    if t != len(teacher.schedule) - 1:
        raise ValueError(f"a one-step pipeline calls t = {len(teacher.schedule) - 1}, the student knows t = {t}")
    scheduler = DDIMScheduler.from_config(
        DDIMScheduler.from_pretrained(teacher.folder / "scheduler").config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,
        clip_sample=False,
        prediction_type=student.prediction,
    )
    teacher.save_pipeline(student.unet, scheduler, folder)
    about: dict[str, Any] = {"steps": 1, "timesteps": [t], "prediction": student.prediction}
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
