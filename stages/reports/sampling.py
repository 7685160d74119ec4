"""Samples images from a sealed teacher or student, for `retort sample`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stages.base import Artifact, Execution, StageError
from stages.data.prompts.vocabulary import prompt_warnings
from stages.distill import Distill, teacher_of
from stages.networks import gaussian

TEACHER_STEPS = 50


def draw(
    artifact: Artifact,
    prompts: list[str],
    count: int,
    seed: int,
    steps: int | None,
    guidance_scale: float,
    out: Path,
    warn: Callable[[str], None],
) -> None:
    """Sample images and write them to one file: a row for each prompt, a column for each noise, the same in all rows.

    steps: sampling steps of a teacher (default 50), or of a student whose method allows several numbers of steps.
    guidance_scale: of a teacher, or of a student that takes it as an input. warn: called with a text if the teacher
    does not know words of the prompts, or truncates prompts. Raises StageError if the artifact makes no images, or if
    the student was not trained for a setting.
    """
    import torch
    from PIL import Image

    from stages.data.noise import noise_for
    from stages.data.pictures import strip
    from stages.diffusion.config import Sampler
    from stages.networks.student import Student
    from stages.networks.teachers import load_network, solve

    kinds = {"teacher": lambda a: a, "distill": lambda a: teacher_of(a.inputs)}
    if artifact.kind not in kinds:
        raise StageError(f"{artifact.folder} is of kind {artifact.kind}; only a teacher or a student makes images")
    folder = kinds[artifact.kind](artifact).folder
    if (folder / gaussian.FILE).exists():
        raise StageError(f"{folder} is an analytic teacher: it makes no images")
    problem = artifact.stage.method.step_count_error(steps) if isinstance(artifact.stage, Distill) and steps else None
    if problem:
        raise StageError(problem)
    for text in prompt_warnings(folder, [prompts]):
        warn(text)
    teacher = load_network(folder, Execution())
    shape = teacher.latent_shape if artifact.kind == "distill" else teacher.noise_shape
    noise = np.stack([noise_for(seed, i, shape, np.dtype(np.float32)) for i in range(count)])
    student = Student.load(artifact.folder, teacher, steps) if artifact.kind == "distill" else None
    w_range = student.form.w_range if student else None
    if w_range and not 1 + w_range[0] <= guidance_scale <= 1 + w_range[1]:
        raise StageError(
            f"the student was trained for guidance_scale from {1 + w_range[0]:g} to {1 + w_range[1]:g}, "
            f"not {guidance_scale:g}"
        )
    rows = []
    with torch.inference_mode():
        for prompt in prompts:
            if student:
                w = torch.full((count,), guidance_scale - 1, device=teacher.device)
                generator = torch.Generator().manual_seed(seed)
                latents = student(teacher.to_device(noise), student.encode([prompt] * count), w, generator)
            else:
                sampler = Sampler(steps=steps or TEACHER_STEPS, guidance_scale=guidance_scale)
                latents = solve(teacher, noise, [prompt] * count, sampler)
            rows.append(strip(teacher.decode(latents).numpy()))
    Image.fromarray(np.concatenate(rows)).save(out)
