"""The non-saturating GAN loss and the R1 penalty, for discriminators whose output is several maps of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

Logits = Sequence[Tensor]
"""A discriminator's output: logit maps (B, H_k, W_k). A positive logit means that the position looks real."""


def generator_loss(fake: Logits) -> Tensor:
    """Return -log D(fake), the mean over positions, then maps, then the batch (Goodfellow et al. 2014, 1406.2661,
    section 3)."""
    return mean_over_maps([softplus(-logits) for logits in fake]).mean()


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """Return -log D(real) - log(1 - D(fake)), averaged as in `generator_loss`. It is 2 ln 2 if all logits are 0."""
    missed = mean_over_maps([softplus(-logits) for logits in real]).mean()
    return missed + mean_over_maps([softplus(logits) for logits in fake]).mean()


def mean_over_maps(maps: Logits) -> Tensor:
    """Average maps (B, H_k, W_k) to (B,). Every map has the same weight, so that no scale dominates."""
    return torch.stack([logits.float().mean((1, 2)) for logits in maps]).mean(0)


def r1_penalty(discriminate: Callable[[Tensor], Logits], real: Tensor, weight: float) -> Tensor:
    """Return the R1 penalty (weight / 2) |grad_x D(x)|^2, averaged over a batch of real x (B, C, H, W).

    Source: Mescheder et al. 2018, 1801.04406, eq. 9. The result is a differentiable scalar.

    D(x) is the sum of a map's logits over its positions, averaged over the maps. The sum is the usual convention for
    discriminators with logit maps. Each element of x affects only the few logits around it, so the penalty grows with
    the number of elements: for latents twice as wide and high, a quarter of the weight has the same effect (measured:
    `python -m tests.benchmarks.r1_size`). With the mean over positions, the penalty would be negligible.

    Attention uses plain matrix products here, because fused kernels (flash, memory-efficient) have no second
    derivative. The penalty is always computed in float32, because squared gradients are inaccurate in bfloat16.
    """
    x = real.detach().float().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        judgement = torch.stack([logits.float().sum((1, 2)) for logits in discriminate(x)]).mean(0)
        (gradient,) = torch.autograd.grad(judgement.sum(), x, create_graph=True)
    return weight / 2 * gradient.square().flatten(1).sum(1).mean()
