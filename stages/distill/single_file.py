"""A student handed out as one file, in the layout that ComfyUI and other programs load."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from stages.base import Artifact, Execution, StageError
from stages.diffusion.form import Form
from stages.distill.stage import teacher_of
from stages.networks.student import Student, whole_network
from stages.networks.teachers import load_network

SAMPLERS = {"DDIMScheduler": "DDIM", "DPMSolverMultistepScheduler": "DDIM", "LCMScheduler": "LCM"}
"""Class of a student's scheduler -> the sampler that programs know. First-order DPM-Solver++ is DDIM."""


def write_single_file(artifact: Artifact, out: Path) -> str:
    """Write a student with its VAE and text encoders to the file `out`, in float32.

    Returns a sentence on how to sample it, which the file does not say. Raises StageError if there is no such layout
    for its family, or if other programs cannot sample it."""
    teacher = load_network(teacher_of(artifact.inputs).folder, Execution(device="cpu"))
    student = Student.load(artifact.folder, teacher)
    form = student.form
    weights = teacher.single_file(whole_network(artifact.folder, teacher), form)
    scheduler = teacher.student_scheduler(form, student.grid)
    problem = _problem(form) or teacher.plain_error(form, student.grid, scheduler)
    if problem:
        raise StageError(f"other programs cannot sample this student: {problem}")
    save_file({name: value.contiguous() for name, value in weights.items()}, out, {"format": "pt"})
    sampler = SAMPLERS.get(type(scheduler).__name__, type(scheduler).__name__)
    timesteps = ", ".join(f"{t:g}" for t in student.grid.timesteps[:0:-1])
    spacing = "timesteps" if form.levels else "trailing timesteps"
    return (
        f"sample it in {form.steps} step{'s' * (form.steps > 1)} with {sampler}, {spacing} {timesteps}, guidance scale "
        f"1 (ComfyUI: cfg 1, because guidance is built in), prediction type {form.prediction}"
    )


def _problem(form: Form) -> str | None:
    """Say what the layout lacks for students of `form`, or return None if it lacks nothing."""
    if form.w_range:
        return "it takes the guidance strength w as an input, for which the layout has no weights"
    if form.schedule != "teacher":
        return f"it has the schedule {form.schedule}, and the layout holds no noise schedule"
    return None
