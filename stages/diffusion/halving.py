"""The target of progressive distillation: one student step replaces two teacher steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.diffusion.few_step import ddim_step, implied_x0
from stages.diffusion.grid import Grid
from stages.diffusion.schedule import Level


def two_step_target(
    denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, i: Tensor, grid: Grid, stochastic: bool = False
) -> Tensor:
    """Return the student's target x0 (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of its grid.

    The teacher takes two DDIM steps from z_t, to z_t' and to z_t''. The target is the x0 for which one DDIM step leads
    from z_t to z_t'' (Salimans and Ho 2022, 2202.00512, algorithm 2):

        x0 = (z_t'' - (sigma_t''/sigma_t) z_t) / (alpha_t'' - (sigma_t''/sigma_t) alpha_t)

    `grid` is the teacher's grid of 2N steps. `denoise(z, j)` is the teacher's estimate of x0 at points j (B,) of that
    grid. Point i of the student's grid, 1 <= i <= N, is point 2i of the teacher's grid. If `stochastic`, the student
    has the stochastic sampler, and each teacher step is twice as long, except at i = 1 (2210.03142, section 3.3).

    The target is a quotient of differences. If there are thousands of steps, their terms are nearly equal, so the
    target is computed in float64."""
    alpha, sigma = (torch.from_numpy(table).to(z.device) for table in (grid.alpha, grid.sigma))
    here, middle, there = 2 * i, 2 * i - 1, 2 * i - 2
    if stochastic:
        middle, there = torch.where(i > 1, 2 * i - 2, 1), torch.where(i > 1, 2 * i - 4, 0)

    def level(j: Tensor) -> Level:
        return Level(alpha[j].view(-1, 1, 1, 1), sigma[j].view(-1, 1, 1, 1), None)

    start = z.double()
    half_way = ddim_step(start, denoise(z, here).double(), level(here), level(middle))
    end = ddim_step(half_way, denoise(half_way.to(z.dtype), middle).double(), level(middle), level(there))
    return implied_x0(start, end, level(here), level(there))
