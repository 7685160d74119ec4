"""What a student of N steps is to estimate so that one step of it is two of its teacher's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.diffusion.few_step import ddim_step, implied_x0
from stages.diffusion.grid import Grid


def two_step_target(
    denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, i: Tensor, grid: Grid, stochastic: bool = False
) -> Tensor:
    """x0 (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of 1..N (2202.00512, algorithm 2).

    `denoise(z, j)` is the teacher's estimate at points j (B,) of its `grid`, of 2 N. A student that is to be sampled
    stochastically jumps twice as far, but for its last step (2210.03142, section 3.3). In float64: with thousands of
    steps, numerator and denominator are differences of nearly equal numbers."""
    alpha, sigma = (torch.from_numpy(table).to(z.device) for table in (grid.alpha, grid.sigma))
    here, middle, there = 2 * i, 2 * i - 1, 2 * i - 2
    if stochastic:
        middle, there = torch.where(i > 1, 2 * i - 2, 1), torch.where(i > 1, 2 * i - 4, 0)

    def level(j: Tensor) -> tuple[Tensor, Tensor]:
        return alpha[j].view(-1, 1, 1, 1), sigma[j].view(-1, 1, 1, 1)

    start = z.double()
    half_way = ddim_step(start, denoise(z, here).double(), level(here), level(middle))
    end = ddim_step(half_way, denoise(half_way.to(z.dtype), middle).double(), level(middle), level(there))
    return implied_x0(start, end, level(here), level(there))
