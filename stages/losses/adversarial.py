"""The non-saturating GAN loss and its penalty, for discriminators that judge every position of several maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

Logits = Sequence[Tensor]
"""Maps (B, H_k, W_k), positive where real is what the discriminator takes it for."""


def generator_loss(fake: Logits) -> Tensor:
    """-log D (Goodfellow et al. 2014, 1406.2661, section 3): over positions of each map, then over maps."""
    return mean_over_maps([softplus(-logits) for logits in fake]).mean()


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """-log D(real) - log(1 - D(fake)), averaged likewise: 2 ln 2 for a discriminator that cannot tell."""
    missed = mean_over_maps([softplus(-logits) for logits in real]).mean()
    return missed + mean_over_maps([softplus(logits) for logits in fake]).mean()


def mean_over_maps(maps: Logits) -> Tensor:
    """Maps (B, H_k, W_k) -> (B,): each counts alike, whatever its size, so that no scale drowns the others."""
    return torch.stack([logits.float().mean((1, 2)) for logits in maps]).mean(0)


def r1_penalty(discriminate: Callable[[Tensor], Logits], real: Tensor, weight: float) -> Tensor:
    """(weight / 2) |grad_x D(x)|^2, averaged over real x (B, C, H, W) (Mescheder et al. 2018, 1801.04406, eq. 9). A
    scalar that can be differentiated once more.

    D(x) is the sum of a map's logits over its positions, averaged over the maps. Summing over positions is the usual
    convention for discriminators that judge every position. Each element of x then sees the few logits around it, so
    that the penalty grows with the number of elements: for latents twice as wide and high, a quarter of the weight
    has the same effect (measured: `python -m tests.benchmarks.r1_size`). Of the mean over positions the penalty would
    be next to nothing.

    No fused attention has a second derivative (flash and memory-efficient kernels raise): here it is composed of
    matrix products. float32 whatever the rest computes in, since a squared gradient is what bfloat16 is worst at.
    """
    x = real.detach().float().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        judgement = torch.stack([logits.float().sum((1, 2)) for logits in discriminate(x)]).mean(0)
        (gradient,) = torch.autograd.grad(judgement.sum(), x, create_graph=True)
    return weight / 2 * gradient.square().flatten(1).sum(1).mean()
