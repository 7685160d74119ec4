"""A student's samples from the noises of held-out pairs, and their error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from stages.data.supply import PairSupply
from stages.diffusion.form import Form
from stages.networks.adapter import Adapter
from stages.networks.student import Student

BATCH = 16
"""The batch size on held-out pairs."""


def comparable(form: Form, guidance_scale: float) -> float | None:
    """Return the w at which a student of `form` should reproduce pairs of `guidance_scale`.

    Returns None if the student learns another guidance, or if its sampler draws noise between steps."""
    if form.steps > 1 and form.sampler != "ddim":
        return None
    w = guidance_scale - 1
    if form.w_range:
        least, most = form.w_range
        return w if least <= w <= most else None
    return w if form.guidance_scale == guidance_scale else None


@torch.no_grad()
def sampled(student: Student, teacher: Adapter, pairs: PairSupply, w: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the student's samples from the noises of held-out pairs, and the pairs' latents: (B, C, H, W) each."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(pairs.held), BATCH):
        held = pairs.reader.batch(pairs.held[start : start + BATCH])
        noise = teacher.to_device(held.noise)
        x0 = student(noise, student.encode(held.prompts), noise.new_full((len(noise),), w), generator)
        yield x0, teacher.to_device(held.latent)


def mean_square(differences: Iterable[Tensor]) -> float:
    """Return the mean square over all elements of tensors (B, C, H, W)."""
    return float(torch.cat([difference.square().mean((1, 2, 3)) for difference in differences]).mean())
