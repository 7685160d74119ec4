"""The sides of a comparison: the same prompts and noise through the teacher in full, in few steps, and the student."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.base import Artifact, Execution, Progress
from stages.data.noise import noise_for
from stages.data.pool import pool_of, read_list
from stages.data.prompts.table import PromptTable
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler
from stages.distill import Distill, sources
from stages.networks.network import NetworkTeacher
from stages.networks.student import Student
from stages.networks.teachers import load_network, solve
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
    """What all sides share. noise: (N, C, h, w) as stored in the pairs; samples: their numbers there, or past them."""

    teacher: NetworkTeacher
    samples: list[int]
    prompts: list[str]
    noise: np.ndarray
    solved: Tensor
    """The teacher's full-step latents of the first samples, taken from the pairs."""


def sample_sides(
    pairs: Artifact,
    student: Artifact | None,
    student_steps: int | None,
    samples: int,
    teacher_steps: list[int],
    execution: Execution,
) -> Generator[Progress, None, tuple[list[Side], Setting]]:
    """The teacher at full steps first, then in few, the student, if there is one, last."""
    assert isinstance(pairs.stage, Pairs)
    held_out = _held_out(pairs, student)
    setting = _setting(pairs, held_out, samples, execution)
    full = pairs.stage.sampler

    def ode(sampler: Sampler) -> Callable[[np.ndarray, list[str]], Tensor]:
        return lambda noise, prompts: solve(setting.teacher, noise, prompts, sampler)

    samplers = [full.model_copy(update={"steps": steps}) for steps in (full.steps, *teacher_steps)]
    plans = [(f"teacher_{sampler.steps}", ode(sampler), sampler.network_calls) for sampler in samplers]
    if student:
        network = Student.load(student.folder, setting.teacher, student_steps)
        plans.append(("student", _few_steps(network, setting.teacher, full.guidance_scale), network.form.steps))
    sides: list[Side] = []
    total = len(plans) * samples
    for name, sampler, n_calls in plans:
        known = setting.solved if not sides else setting.solved[:0]
        latents, seconds = _sample(sampler, setting, known)
        sides.append(Side(name, latents, n_calls, seconds))
        yield Progress(len(sides) * samples, total, UNIT, {"seconds_per_image": seconds})
    return sides, setting


def _few_steps(
    student: Student, teacher: NetworkTeacher, guidance_scale: float
) -> Callable[[np.ndarray, list[str]], Tensor]:
    further = torch.Generator().manual_seed(0)  # of samplers that draw more noise on the way

    def sampled(noise: np.ndarray, texts: list[str]) -> Tensor:
        w = torch.full((len(noise),), guidance_scale - 1, device=teacher.device)
        return student(teacher.to_device(noise), teacher.encode_prompts(texts), w, further)

    return sampled


def _held_out(pairs: Artifact, student: Artifact | None) -> int:
    """How many of the pairs, its last, the student was not trained on."""
    assert isinstance(pairs.stage, Pairs)
    trained_on = [source.fingerprint for source in sources(student.inputs)] if student else []
    if pairs.fingerprint not in trained_on:
        return pairs.stage.count
    assert student and isinstance(student.stage, Distill)
    return student.stage.held_out if pairs.fingerprint == trained_on[0] else 0


def _setting(pairs: Artifact, held_out: int, samples: int, execution: Execution) -> Setting:
    """The last, held-out pairs first; where they do not suffice, fresh noise past the last pair's."""
    assert isinstance(pairs.stage, Pairs)
    # the teacher as the factory ran it
    teacher = load_network(pairs.inputs["teacher"].folder, execution, dtype=pairs.stage.dtype)
    reader = PairReader(read_list(pairs.folder))
    taken = min(samples, held_out)
    start = len(reader) - held_out
    held = reader.batch(range(start, start + taken))
    fresh = range(len(reader), len(reader) + samples - taken)
    texts = PromptTable(pool_of(pairs.folder)).of(fresh) if fresh else []
    seed = int(pairs.record["seed"])
    noise = [noise_for(seed, i, teacher.latent_shape, held.noise.dtype)[None] for i in fresh]
    return Setting(
        teacher=teacher,
        samples=[*range(start, start + taken), *fresh],
        prompts=[*held.prompts, *texts],
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
