"""The scheduler that makes plain diffusers step as a student's own sampler does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from stages.diffusion.consistency import TIMESTEP_SCALING
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid, cosine_train_steps


def why_not_plain(form: Form, grid: Grid, scheduler: Any) -> str | None:
    """What keeps plain diffusers from running such a student as Retort does, with the scheduler made for it; None:
    nothing."""
    foreign = _foreign(form)
    if foreign:
        return foreign
    scheduler.set_timesteps(form.steps)
    if scheduler.timesteps.tolist() != grid.timesteps[:0:-1].tolist():
        return f"it rounds the timesteps of {form.steps} steps otherwise, and would call the student where it never was"
    return None


def _foreign(form: Form) -> str | None:
    """What no scheduler of diffusers could do."""
    if form.sampler == "stochastic" and form.steps > 1:
        return "the N-step stochastic sampler is Retort's own"
    if form.prediction == "both":
        return "it estimates both x0 and the noise, of which diffusers knows nothing"
    if form.schedule == "cosine" and cosine_train_steps(form.steps) % form.steps:
        return f"its {form.steps} steps are at timesteps that are no whole numbers"
    return None


def scheduler_of(form: Form, grid: Grid, teacher: Path) -> Any:
    """From the scheduler in the teacher's folder; one that diffusers takes, also where `why_not_plain` says that it
    does not step as the student needs."""
    config = {
        **DDIMScheduler.from_pretrained(teacher / "scheduler").config,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "clip_sample": False,
        "thresholding": False,
        "prediction_type": form.prediction if form.prediction != "both" else "sample",
    }
    # what the teacher's JSON leaves out stands in this list, and from_config takes another class's default for it
    config.pop("_use_default_values", None)
    if form.schedule == "cosine":
        squared = Grid.cosine(grid.train_steps).alpha ** 2
        betas = (1 - squared[1:] / squared[:-1]).tolist()
        own = {"trained_betas": betas, "num_train_timesteps": grid.train_steps, "rescale_betas_zero_snr": False}
        config |= own
    if form.sampler == "consistency":
        lcm = {"original_inference_steps": form.steps, "timestep_scaling": TIMESTEP_SCALING}
        return LCMScheduler.from_config({**config, **lcm})
    if grid.train_steps % form.steps == 0 or _foreign(form):
        return DDIMScheduler.from_config(config)
    # DDIMScheduler steps to t - T // N, which its own grid misses; the first-order DPM-Solver++ is DDIM and does not
    return DPMSolverMultistepScheduler.from_config(
        {**config, "algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    )
