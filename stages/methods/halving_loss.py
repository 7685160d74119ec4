"""What every round that halves steps minimises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.diffusion.guidance import draw
from stages.diffusion.weighting import Weighting, weights
from stages.networks.student import Student

Target = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x~ (B, C, H, W), float64, for z (B, C, H, W) at points i (B,) of the student's, and w (B,) if it takes one."""


def halving_loss(
    student: Student, target: Target, weighting: Weighting, x: Tensor, condition: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """w(lambda_t) |x~ - x^(z_t)|^2 for data x (B, C, H, W), at points drawn evenly; w likewise, for each sample."""
    i = torch.randint(1, student.form.steps + 1, (len(x),)).to(x.device)
    w = draw(student.form.w_range, len(x)).to(x.device) if student.form.w_range else None
    z = student.noised(x, torch.randn_like(x), i)
    with torch.no_grad():
        wanted = target(z, i, w)
    error = student.error(z, i, wanted, condition, w)
    weight = weights(weighting, student.alpha[i], student.sigma[i])
    return (weight.to(error.dtype) * error).mean(), {"x0_error": error.mean()}
