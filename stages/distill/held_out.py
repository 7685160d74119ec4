"""A student's samples from the noises of held-out pairs, and their error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from stages.data.supply import PairSupply
from stages.diffusion.config import Scale, covers
from stages.diffusion.form import Form
from stages.networks.adapter import Adapter
from stages.networks.student import Student

BATCH = 16
"""The batch size on held-out pairs."""


def comparable(form: Form, guidance_scale: Scale) -> bool:
    """Whether a student of `form` should reproduce pairs of `guidance_scale`. It should not if it learned another
    guidance scale, or if its sampler draws noise between steps."""
    if form.steps > 1 and form.sampler != "ddim":
        return False
    return form.scale is not None and covers(form.scale, guidance_scale)


@torch.no_grad()
def sampled(student: Student, teacher: Adapter, pairs: PairSupply) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the student's samples from the noises of held-out pairs, and the pairs' latents: (B, C, H, W) each."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(pairs.held), BATCH):
        held = pairs.read(pairs.held[start : start + BATCH])
        noise, w = teacher.to_device(held["noise"]), teacher.to_device(held["w"])
        yield student(noise, student.encode(held["prompts"]), w, generator), teacher.to_device(held["latent"])


def mean_square(differences: Iterable[Tensor]) -> float:
    """Return the mean square over all elements of tensors (B, C, H, W)."""
    return float(torch.cat([difference.square().mean((1, 2, 3)) for difference in differences]).mean())
