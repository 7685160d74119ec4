"""Who teaches a student of few steps: a teacher of many, or another student."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.base import StageError
from stages.diffusion.grid import Grid
from stages.diffusion.guidance import guide_by_w
from stages.diffusion.prediction import to_x0
from stages.networks.network import NetworkTeacher
from stages.networks.student import column


class Denoiser(Protocol):
    """x0 (B, C, H, W) as estimated from z (B, C, H, W) at points i (B,) of its grid, guided by w (B,) if it takes
    one."""

    grid: Grid

    def x0(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor: ...


class ManyStep:
    """A teacher of many steps at the points of a grid, guided by `guidance_scale`, or by w where that is given.

    It is asked at the timestep, between two of its own if need be, where its ratio of data to noise is the grid's; it
    was not trained beyond the noisiest and the cleanest that it knows, and there is asked at that one. Beyond the
    noisiest its output is read at that level too: a schedule that ends in pure noise begins as the teacher itself
    would. Beyond the cleanest it is read at the grid's level, at which z is nearly the data already. It computes in its
    own dtype whatever the student trains in: guidance multiplies what is rounded."""

    def __init__(self, teacher: NetworkTeacher, grid: Grid, guidance_scale: float = 1.0) -> None:
        self.teacher, self.grid, self.default_w = teacher, grid, guidance_scale - 1.0
        known = teacher.schedule.log_snr
        with np.errstate(divide="ignore"):
            wanted = 2 * (np.log(grid.alpha[1:]) - np.log(grid.sigma[1:]))
        timesteps = np.interp(-wanted, -known, np.arange(len(known)))
        last = teacher.schedule.at(len(known) - 1)
        alpha, sigma = (
            np.where(wanted < known[-1], end, own[1:]) for end, own in zip(last, (grid.alpha, grid.sigma), strict=True)
        )
        tables = timesteps, alpha, sigma
        self.timesteps, self.alpha, self.sigma = (
            torch.from_numpy(np.concatenate([[0.0], table])).to(teacher.device) for table in tables
        )

    @torch.no_grad()
    def x0(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor | None = None) -> Tensor:
        z = z.float()
        t, alpha, sigma = self.timesteps[i].float(), column(self.alpha[i], z), column(self.sigma[i], z)
        if w is None and self.default_w == 0:
            return to_x0(self.teacher.prediction, self._call(z, t, condition), z, alpha, sigma)
        if condition is None:
            raise StageError("the teacher is unconditional and cannot be guided")
        empty = self.teacher.encode_prompts([""])
        assert empty is not None
        both = torch.cat([empty.expand_as(condition), condition])
        unconditional, conditional = self._call(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        strength = self.default_w if w is None else column(w, z)
        return to_x0(self.teacher.prediction, guide_by_w(unconditional, conditional, strength), z, alpha, sigma)

    def _call(self, z: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        with torch.autocast(self.teacher.device.type, enabled=False):
            output: Tensor = self.teacher.unet(z.to(self.teacher.dtype), t, condition).sample
        return output.float()
