"""Denoisers: what a method distils into a student. A denoiser is a many-step teacher or another student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.diffusion.grid import Grid
from stages.diffusion.guidance import guide_by_w
from stages.diffusion.prediction import power, to_x0
from stages.diffusion.schedule import Level
from stages.networks.adapter import Adapter
from stages.networks.condition import Condition
from stages.networks.student import column


class Denoiser(Protocol):
    """An estimator of x0 at the points of a time grid. `Student` and `TeacherDenoiser` implement it."""

    grid: Grid

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the condition for `prompts`, one row for each prompt."""

    def x0(self, z: Tensor, i: Tensor, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Estimate x0 (B, C, H, W) from z (B, C, H, W) at points i (B,) of the grid.

        w (B,) is guidance_scale - 1. None: the denoiser's own guidance."""


class TeacherDenoiser:
    """A many-step teacher at the points of a grid. Its guidance is `guidance_scale`, or the w that is passed to `x0`.

    The grid may have other noise levels than the teacher's schedule. At each point the teacher is called at the
    timestep at which its schedule has the grid's signal-to-noise ratio alpha^2 / sigma^2. Timesteps are interpolated
    linearly in the log SNR, and may be fractional. z is scaled so that its alpha and sigma are those of the teacher at
    that timestep. The scale is 1 if both schedules are variance preserving.

    The teacher was not trained outside the SNR range of its schedule. At noisier points it is called at its last
    timestep, z is not scaled, and x0 is computed with alpha and sigma of that timestep. So on a grid that ends in pure
    noise, the first call is the same as in the teacher's own sampling. At cleaner points it is called at
    timestep 0, and x0 is computed with alpha and sigma of the grid.

    The teacher always computes in its own dtype, also in mixed-precision training, because guidance amplifies rounding
    errors."""

    def __init__(self, teacher: Adapter, grid: Grid, guidance_scale: float = 1.0) -> None:
        self.teacher, self.grid, self.default_w = teacher, grid, guidance_scale - 1.0
        known = teacher.schedule.log_snr
        with np.errstate(divide="ignore"):
            wanted = 2 * (np.log(grid.alpha[1:]) - np.log(grid.sigma[1:]))
        finite = np.isfinite(known)  # a schedule's last level may be pure noise
        timesteps = np.interp(-wanted, -known[finite], np.arange(len(known))[finite])
        timesteps = np.where(wanted == known[-1], len(known) - 1, timesteps)
        powers = power(teacher.schedule.alpha, teacher.schedule.sigma)
        scale = np.sqrt(np.interp(timesteps, np.arange(len(powers)), powers) / power(grid.alpha[1:], grid.sigma[1:]))
        last = teacher.schedule.at(len(known) - 1)
        alpha, sigma = (
            np.where(wanted < known[-1], end, scale * values[1:])
            for end, values in zip(last, (grid.alpha, grid.sigma), strict=True)
        )
        tables = (timesteps, alpha, sigma, np.where(wanted < known[-1], 1.0, scale))
        self.timesteps, self.alpha, self.sigma, self.scale = (
            torch.from_numpy(np.concatenate([[0.0], table])).to(teacher.device) for table in tables
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the teacher's condition for `prompts`, one row for each prompt."""
        return self.teacher.teacher_condition(prompts)

    @torch.no_grad()
    def x0(self, z: Tensor, i: Tensor, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Estimate x0 (B, C, H, W), without gradients, from z (B, C, H, W) at points i (B,) of the grid.

        Points are from 1 to N. w (B,) replaces the guidance of the constructor."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))  # float64 stays
        z = z * column(self.scale[i], z)
        level = Level(column(self.alpha[i], z), column(self.sigma[i], z), self.timesteps[i].float())
        if w is None and self.default_w == 0:
            return to_x0(self.teacher.prediction, self.teacher.output(z, level, condition), z, *level)
        both = Condition.cat([self.teacher.teacher_dropped().expand(len(condition)), condition])
        twice = Level(*(torch.cat([one, one]) for one in (level.alpha, level.sigma, level.timestep)))
        dropped, conditional = self.teacher.output(torch.cat([z, z]), twice, both).chunk(2)
        strength = self.default_w if w is None else column(w, z)
        return to_x0(self.teacher.prediction, guide_by_w(dropped, conditional, strength), z, *level)
