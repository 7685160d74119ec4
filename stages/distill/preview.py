"""Images of fixed noises that show how a student changes while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from stages.data import pictures
from stages.networks.adapter import Adapter
from stages.networks.student import Student
from stages.training.loop import LOG_EVERY
from stages.training.players import PREVIEWS

FOLDER = "previews"
"""A folder of strips, one for each preview."""
COLUMNS, LARGEST = 8, 256
"""Number of noises, and the largest width of their images in pixels."""
MOST_CALLS = 16
"""Students of more steps are not drawn, because that takes long."""


class Previews:
    """Samples the averaged student from the same noises and prompts, about `count` times while it is trained.

    Each preview is a strip of images, `previews/step-NUMBER.png`. An interrupted training keeps its strips."""

    def __init__(self, output: Path, teacher: Adapter, prompts: Sequence[str], steps: int, count: int) -> None:
        """`prompts` has one for each noise. `steps` is the number of training steps, `count` that of previews."""
        self.output, self.teacher, self.steps, self.count = output, teacher, steps, count
        self.prompts = list(prompts)
        self.every = max(1, round(steps / max(count, 1) / LOG_EVERY)) * LOG_EVERY
        self.noise = torch.randn(len(self.prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self, step: int, averages: Mapping[str, nn.Module]) -> None:
        """Write the strip of `step`, a multiple of LOG_EVERY or the last step, if a preview is due."""
        student = averages["student"]
        assert isinstance(student, Student)
        due = step % self.every == 0 or step == self.steps
        if not (self.count and due and student.form.steps <= MOST_CALLS):
            return
        noise = self.noise.to(self.teacher.device)
        w = noise.new_full((len(noise),), sum(student.form.w_range) / 2 if student.form.w_range else 0.0)
        x0 = student(noise, student.encode(self.prompts), w, torch.Generator().manual_seed(0))
        strip = Image.fromarray(pictures.strip(self.teacher.decode(x0).numpy()))
        strip.thumbnail((LARGEST * len(noise), strip.height))
        (self.output / FOLDER).mkdir(exist_ok=True)
        strip.save(self.output / FOLDER / f"step-{step:07}.png")

    def draw(self) -> None:
        """Draw the strips below one another as PREVIEWS, if there are any."""
        strips = sorted((self.output / FOLDER).glob("step-*.png"))
        rows = [
            (f"step {int(path.stem.removeprefix('step-')):,}", pictures.cut(Image.open(path), len(self.prompts)))
            for path in strips
        ]
        if rows:
            pictures.figure(rows, self.prompts).save(self.output / PREVIEWS)
