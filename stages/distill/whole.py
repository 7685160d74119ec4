"""Exports a whole student: as one file that ComfyUI and other programs load, or as a diffusers pipeline."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file

from stages.base import Artifact, Execution, StageError
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.distill.card import derived_card
from stages.distill.stage import teacher_of
from stages.networks.student import Student, export, stored, whole_network
from stages.networks.teachers import load_network

SAMPLERS = {"DDIMScheduler": "DDIM", "DPMSolverMultistepScheduler": "DDIM", "LCMScheduler": "LCM"}
"""Class of a student's scheduler -> the sampler that programs know. First-order DPM-Solver++ is DDIM."""


def write_single_file(artifact: Artifact, out: Path) -> str:
    """Write a student with its VAE and text encoders to the file `out`, in float32.

    Returns a sentence on how to sample it, because the file does not say it. Raises StageError if there is no such
    layout for its family, or if other programs cannot sample it."""
    teacher = load_network(teacher_of(artifact.inputs).folder, Execution(device="cpu"))
    form, _ = stored(artifact.folder)
    grid = Grid.of(form, teacher.schedule)
    scheduler = teacher.student_scheduler(form, grid)
    problem = _problem(form) or teacher.plain_error(form, grid, scheduler)
    if problem:
        raise StageError(f"other programs cannot sample this student: {problem}")
    weights = teacher.single_file(whole_network(artifact.folder, teacher), form)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    save_file({name: value.contiguous() for name, value in weights.items()}, unfinished, {"format": "pt"})
    unfinished.rename(out)
    sampler = SAMPLERS.get(type(scheduler).__name__, type(scheduler).__name__)
    timesteps = ", ".join(f"{t:g}" for t in grid.timesteps[:0:-1])
    spacing = "timesteps" if form.levels else "trailing timesteps"
    sizes = "".join(f", {name} {value}" for name, value in teacher.call_settings.items())
    return (
        f"sample it in {form.steps} step{'s' * (form.steps > 1)} with {sampler}, {spacing} {timesteps}, guidance scale "
        f"1 (ComfyUI: cfg 1, because guidance is built in), prediction type {form.prediction}{sizes}"
    )


def write_pipeline(artifact: Artifact, out: Path) -> str:
    """Write a LoRA student to the folder `out` as a pipeline, with the LoRA added to the teacher's weights.

    Returns the code that samples it. Raises StageError if the student is a pipeline already, or if plain diffusers
    cannot sample it."""
    taught_by = teacher_of(artifact.inputs)
    teacher = load_network(taught_by.folder, Execution(device="cpu"))
    form, lora = stored(artifact.folder)
    if lora is None or lora.merged:
        raise StageError(f"{artifact.folder} is a pipeline already")
    grid = Grid.of(form, teacher.schedule)
    scheduler = teacher.student_scheduler(form, grid)
    problem = teacher.plain_error(form, grid, scheduler)
    if problem:
        raise StageError(f"plain diffusers cannot sample this student: {problem}")
    code = teacher.usage(form, type(scheduler).__name__)
    what = f"A student of {{teacher}}, with its LoRA of rank {lora.rank} added to the weights."
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    student = Student(teacher, whole_network(artifact.folder, teacher), grid, form)
    export(student, unfinished, derived_card(artifact, form, taught_by, "student", what, code))
    unfinished.rename(out)
    return code


def _problem(form: Form) -> str | None:
    """Return why the layout cannot hold students of `form`, or None if it can."""
    if form.w_range:
        return "it takes the guidance strength w as an input, for which the layout has no weights"
    if form.schedule != "teacher":
        return f"it has the schedule {form.schedule}, and the layout holds no noise schedule"
    return None
