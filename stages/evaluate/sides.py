"""Samples the sides of an evaluation from the same prompts and noises: the teacher, the teacher in fewer steps, and the
student.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.base import Artifact, Progress
from stages.data.noise import guidance_scale_for, noise_for
from stages.data.pool import pool_of, read_list
from stages.data.prompts.table import PromptTable
from stages.data.reader import PairReader
from stages.diffusion.config import Sampler, Scale
from stages.evaluate.config import EvaluationExecution
from stages.evaluate.noises import Noises
from stages.networks.adapter import Adapter
from stages.networks.student import Student
from stages.networks.teachers import load_network, solve
from stages.pairs import Pairs

UNIT = "samples"

Sample = Callable[[slice], Tensor]
"""Latents (B, C, h, w) for a slice of the samples."""


@dataclass(frozen=True)
class Side:
    """The samples of one side, and their cost.

    latents: (N, C, h, w), scaled, float32, on the CPU. calls: network calls per image. seconds: seconds
    per image, without decoding.
    """

    name: str
    latents: Tensor
    calls: int
    seconds: float


@dataclass(frozen=True)
class Setting:
    """The teacher, prompts and noises that all sides share.

    samples: N numbers, from which each sample's noise, prompt and guidance scale follow. noise: (N, C, h, w) in the
    pairs' storage dtype.
    """

    teacher: Adapter
    samples: list[int]
    prompts: list[str]
    noise: np.ndarray
    scales: NDArray[np.float32]
    """(N,), the guidance scale of each sample."""
    solved: Tensor
    """The teacher's full-step latents of the samples that are stored in the pairs. These samples come first."""


def sample_sides(
    pairs: Artifact,
    student: Artifact | None,
    student_steps: int | None,
    noises: Noises,
    guidance_scale: float | None,
    teacher_steps: list[int],
    execution: EvaluationExecution,
) -> Generator[Progress, None, tuple[list[Side], Setting]]:
    """Sample the teacher in full steps, then in each of `teacher_steps`, then the student if there is one.

    student_steps: None for the student's own number of steps. guidance_scale: None for that of each pair. Returns the
    sides in this order, and their Setting.
    """
    assert isinstance(pairs.stage, Pairs)
    full = pairs.stage.sampler
    if guidance_scale:
        full = full.model_copy(update={"guidance_scale": guidance_scale})
    setting = _setting(pairs, noises, full.guidance_scale, execution)
    drawn = isinstance(full.guidance_scale, tuple)

    def ode(sampler: Sampler) -> Sample:
        def sampled(rows: slice) -> Tensor:
            scales = setting.scales[rows] if drawn else None
            return solve(setting.teacher, setting.noise[rows], setting.prompts[rows], sampler, scales)

        return sampled

    samplers = [full.model_copy(update={"steps": steps}) for steps in (full.steps, *teacher_steps)]
    plans = [(f"teacher_{sampler.steps}", ode(sampler), sampler.network_calls) for sampler in samplers]
    if student:
        network = Student.load(student.folder, setting.teacher, student_steps)
        if setting.teacher.dtype != torch.float32:
            network.compute_in(setting.teacher.dtype)
        plans.append(("student", _few_steps(network, setting), network.form.steps))
    sides: list[Side] = []
    total = len(plans) * noises.count
    for name, sampler, n_calls in plans:
        known = setting.solved if not sides else setting.solved[:0]
        latents, seconds = _sample(sampler, setting, known, execution.micro_batch)
        sides.append(Side(name, latents, n_calls, seconds))
        yield Progress(len(sides) * noises.count, total, UNIT, {"seconds_per_image": seconds})
    return sides, setting


def _few_steps(student: Student, setting: Setting) -> Sample:
    """Return the sampler of the student. Each sample has its own generator for noise between steps, so that results do
    not depend on the batch."""
    teacher = setting.teacher

    def sampled(rows: slice) -> Tensor:
        noise = teacher.to_device(setting.noise[rows])
        w = teacher.to_device(setting.scales[rows] - 1)
        generators = [torch.Generator().manual_seed(number) for number in setting.samples[rows]]
        return student(noise, student.encode(setting.prompts[rows]), w, generators)

    return sampled


def _setting(pairs: Artifact, noises: Noises, scale: Scale, execution: EvaluationExecution) -> Setting:
    """Read the stored noises and prompts of the pairs, draw the fresh ones, and load the teacher.

    The latents of the pairs are kept if they have the guidance scale `scale`."""
    assert isinstance(pairs.stage, Pairs)
    # computes in the dtype that the pairs were made with
    teacher = load_network(pairs.inputs["teacher"].folder, execution, dtype=pairs.stage.dtype)
    noise = np.empty((noises.count, *teacher.latent_shape), pairs.stage.storage_dtype)
    solved: np.ndarray = noise[:0]
    prompts: list[str] = []
    if noises.stored:
        held = PairReader(read_list(pairs.folder)).batch(noises.stored)
        noise[: len(noises.stored)], solved, prompts = held.noise, held.latent, held.prompts
    if noises.fresh:
        prompts += PromptTable(pool_of(pairs.folder)).of(noises.fresh)
    for place, number in enumerate(noises.fresh, len(noises.stored)):
        noise[place] = noise_for(pairs.seed, number, teacher.latent_shape, noise.dtype)
    numbers = [*noises.stored, *noises.fresh]
    return Setting(
        teacher=teacher,
        samples=numbers,
        prompts=prompts,
        noise=noise,
        scales=np.array([guidance_scale_for(pairs.seed, n, *scale) for n in numbers])
        if isinstance(scale, tuple)
        else np.full(len(numbers), scale, np.float32),
        solved=torch.from_numpy(solved if scale == pairs.stage.sampler.guidance_scale else solved[:0]).float(),
    )


def _sample(sampler: Sample, setting: Setting, known: Tensor, micro_batch: int) -> tuple[Tensor, float]:
    """Sample all latents except the first ones, which are already `known`. Return all latents and seconds per image.

    The seconds are measured on one additional batch, after a warm-up batch.
    """
    latents = [known]
    with torch.inference_mode():
        for start in range(len(known), len(setting.noise), micro_batch):
            latents.append(sampler(slice(start, start + micro_batch)).float().cpu())
        first = slice(micro_batch)
        sampler(first).cpu()
        started = time.perf_counter()
        sampler(first).cpu()
        seconds = (time.perf_counter() - started) / min(micro_batch, len(setting.noise))
    return torch.cat(latents), seconds
