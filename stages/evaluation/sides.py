"""The sides of a comparison: the same prompts and noise through the teacher in full, in few steps, and the student."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.base import Artifact, Execution, Progress
from stages.data import prompts as prompt_sources
from stages.data.noise import noise_for
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler
from stages.distill import Distill
from stages.networks.compute import device_of
from stages.networks.latent import LatentTeacher
from stages.networks.student import OneStepStudent
from stages.networks.teachers import solve
from stages.pairs import Pairs

BATCH = 64
UNIT = "samples"


@dataclass(frozen=True)
class Side:
    """latents (N, C, h, w), scaled, on the CPU; seconds an image, decoding left out."""

    name: str
    latents: Tensor
    calls: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What all sides share. noise: (N, C, h, w) as stored in the pairs."""

    teacher: LatentTeacher
    prompts: list[str]
    noise: np.ndarray
    solved: Tensor
    """The teacher's full-step latents of the first samples, taken from held-out pairs."""


def sample_sides(
    student: Artifact, samples: int, teacher_steps: list[int], execution: Execution
) -> Generator[Progress, None, tuple[list[Side], Setting]]:
    """The teacher at full steps first, then in few, the student last."""
    pairs = student.inputs["pairs"]
    assert isinstance(pairs.stage, Pairs)
    setting = _setting(student, samples, execution)
    network = OneStepStudent.load(student.folder, setting.teacher)
    full = pairs.stage.sampler

    def ode(steps: int) -> Callable[[np.ndarray, list[str]], Tensor]:
        sampler: Sampler = full.model_copy(update={"steps": steps})
        return lambda noise, prompts: solve(setting.teacher, noise, prompts, sampler)

    def once(noise: np.ndarray, prompts: list[str]) -> Tensor:
        return network(setting.teacher.to_device(noise), setting.teacher.encode_prompts(prompts))

    calls = 1 if full.guidance_scale == 1 else 2
    plans = [(f"teacher_{steps}", ode(steps), steps * calls) for steps in (full.steps, *teacher_steps)]
    plans.append(("student", once, 1))
    sides: list[Side] = []
    total = len(plans) * samples
    for name, sampler, n_calls in plans:
        known = setting.solved if not sides else setting.solved[:0]
        latents, seconds = _sample(sampler, setting, known)
        sides.append(Side(name, latents, n_calls, seconds))
        yield Progress(len(sides) * samples, total, UNIT, {"seconds_per_image": seconds})
    return sides, setting


def _setting(student: Artifact, samples: int, execution: Execution) -> Setting:
    """Held-out pairs first; where they do not suffice, fresh noise past the last pair's."""
    distill, pairs = student.stage, student.inputs["pairs"]
    assert isinstance(distill, Distill) and isinstance(pairs.stage, Pairs)
    dtype = getattr(torch, pairs.stage.dtype)  # the teacher as the factory ran it
    teacher = LatentTeacher(pairs.inputs["teacher"].folder, device=device_of(execution), dtype=dtype)
    reader = PairReader(read_list(pairs.folder))
    taken = min(samples, distill.held_out)
    start = len(reader) - distill.held_out
    held = reader.batch(range(start, start + taken))
    fresh = range(len(reader), len(reader) + samples - taken)
    contents = pairs.record["identity"]["contents"]
    texts = prompt_sources.load(pairs.stage.prompts, contents["prompts"]) if fresh else []
    seed = int(pairs.record["seed"])
    noise = [noise_for(seed, i, teacher.latent_shape, held.noise.dtype)[None] for i in fresh]
    return Setting(
        teacher=teacher,
        prompts=[*held.prompts, *(texts[i % len(texts)] for i in fresh)],
        noise=np.concatenate([held.noise, *noise]),
        solved=torch.from_numpy(held.latent).float(),
    )


def _sample(
    sampler: Callable[[np.ndarray, list[str]], Tensor], setting: Setting, known: Tensor
) -> tuple[Tensor, float]:
    """Latents of all samples, those in `known` taken as they are; and seconds an image, of the second of two more
    batches."""
    latents = [known]
    with torch.inference_mode():
        for start in range(len(known), len(setting.noise), BATCH):
            stop = min(start + BATCH, len(setting.noise))
            latents.append(sampler(setting.noise[start:stop], setting.prompts[start:stop]).float().cpu())
        first = setting.noise[:BATCH], setting.prompts[:BATCH]
        sampler(*first).cpu()
        started = time.perf_counter()
        sampler(*first).cpu()
        seconds = (time.perf_counter() - started) / len(first[0])
    return torch.cat(latents), seconds
