"""The diffusers scheduler that is exported with a student, so that plain diffusers samples as Retort does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from stages.diffusion.consistency import TIMESTEP_SCALING
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid, cosine_train_steps

BOUNDARY_ENDS = 5
"""From this timestep on, the LCM boundary condition adds less than 1e-4 of the state to an estimate."""


def plain_error(form: Form, grid: Grid, scheduler: Any) -> str | None:
    """Return why plain diffusers cannot sample a student of `form` and `grid` as Retort does, or None if it can.

    `scheduler` is the result of `scheduler_of`. The function sets its timesteps."""
    foreign = _foreign(form)
    if foreign:
        return foreign
    if form.sampler == "consistency" and form.boundary == "none" and grid.timesteps[1] < BOUNDARY_ENDS:
        return f"at timestep {grid.timesteps[1]:g}, diffusers' LCM sampler applies a boundary condition"
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(form.steps)
        if np.allclose(scheduler.sigmas[:-1].numpy(), grid.sigma[:0:-1], atol=1e-6):
            return None
        return (
            f"in {form.steps} steps, diffusers' flow scheduler has other noise levels than "
            f"{grid.sigma[:0:-1].round(4).tolist()}"
        )
    if form.levels:
        scheduler.set_timesteps(timesteps=list(form.levels))
    else:
        scheduler.set_timesteps(form.steps)
    if scheduler.timesteps.tolist() != grid.timesteps[:0:-1].tolist():
        return (
            f"diffusers rounds the timesteps of {form.steps} steps differently, and would call the student at "
            "timesteps at which it was not trained"
        )
    return None


def _foreign(form: Form) -> str | None:
    """Return why no scheduler of diffusers can sample a student of `form`, or None if one may."""
    if form.sampler == "stochastic" and form.steps > 1:
        return "diffusers has no N-step stochastic sampler"
    if form.prediction == "both":
        return "the student predicts both x0 and the noise, which diffusers does not support"
    if form.boundary == "lcm" and form.sampler != "consistency":
        return "the student has the LCM boundary condition, which diffusers applies in its LCM sampler only"
    if form.schedule == "cosine" and cosine_train_steps(form.steps) % form.steps:
        return f"the timesteps of {form.steps} steps are not all whole numbers, as diffusers requires"
    return None


def scheduler_of(form: Form, grid: Grid, teacher: Path) -> Any:
    """Create the scheduler for a student of `form` and `grid` from the scheduler in the teacher's folder.

    diffusers can load it in all cases, also where `plain_error` says that it samples differently."""
    stored = DDIMScheduler.load_config(teacher / "scheduler")
    if stored["_class_name"] == "FlowMatchEulerDiscreteScheduler":
        return FlowMatchEulerDiscreteScheduler.from_config(stored)
    config = {
        **DDIMScheduler.from_pretrained(teacher / "scheduler").config,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "clip_sample": False,
        "thresholding": False,
        "prediction_type": form.prediction if form.prediction != "both" else "sample",
    }
    # This list has the keys that are missing in the teacher's JSON. For them, from_config would take the defaults of
    # the new scheduler's class.
    config.pop("_use_default_values", None)
    if form.schedule == "cosine":
        squared = Grid.cosine(grid.train_steps).alpha ** 2
        betas = (1 - squared[1:] / squared[:-1]).tolist()
        own = {"trained_betas": betas, "num_train_timesteps": grid.train_steps, "rescale_betas_zero_snr": False}
        config |= own
    if form.sampler == "consistency":
        lcm = {"original_inference_steps": form.steps, "timestep_scaling": TIMESTEP_SCALING}
        return LCMScheduler.from_config({**config, **lcm})
    if not form.levels and (grid.train_steps % form.steps == 0 or _foreign(form)):
        return DDIMScheduler.from_config(config)
    # DDIMScheduler steps to t - T // N, which is not always a point of its grid. DPM-Solver++ of first order is equal
    # to DDIM, and steps from point to point.
    return DPMSolverMultistepScheduler.from_config(
        {**config, "algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    )
