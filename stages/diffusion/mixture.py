"""The optimal denoiser of a finite set of data, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 8192
"""The number of data that are compared with z at once. The distances of 64 samples of z then take 4 MB in float64."""
LEAST = -1e300
"""A finite logarithm below all others. With it, a chunk without allowed data gives no NaN."""


def posterior(
    z: Tensor,
    data: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    spread: float,
    allowed: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return (E[x | z], log p(z)) for z = alpha x + sigma noise (B, D), where x is near one of `data` (N, D).

    x is normally distributed around each datum with standard deviation `spread`, h below. All data are equally likely.
    alpha and sigma are (B, 1). The result is (B, D) and (B,). All tensors are float64.

    E[x | z] = sum_i w_i (x_i + alpha h^2 / s^2 (z - alpha x_i)), with s^2 = sigma^2 + alpha^2 h^2 and
    w = softmax_i(-|z - alpha x_i|^2 / (2 s^2)). Gradients flow to z.

    `allowed` (B, N) restricts the data for each sample, at least one for each. `chunk` changes only the rounding and
    the memory."""
    variance = sigma**2 + (alpha * spread) ** 2
    largest, total = z.new_full((len(z), 1), LEAST), z.new_zeros(len(z), 1)
    weighted = torch.zeros_like(z)
    for start in range(0, len(data), chunk):
        part = data[start : start + chunk]
        square = z.square().sum(1, keepdim=True) - 2 * alpha * (z @ part.T) + alpha**2 * part.square().sum(1)
        logits = -square / (2 * variance)
        if allowed is not None:
            logits = logits.masked_fill(~allowed[:, start : start + chunk], -math.inf)
        new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
        rescale, weights = (largest - new_largest).exp(), (logits - new_largest).exp()
        total = total * rescale + weights.sum(1, keepdim=True)
        weighted = weighted * rescale + weights @ part
        largest = new_largest
    mean = weighted / total
    count = z.new_full((len(z), 1), len(data)) if allowed is None else allowed.sum(1, keepdim=True).to(z)
    log_density = largest + total.log() - count.log() - z.shape[1] / 2 * (2 * math.pi * variance).log()
    return mean + alpha * spread**2 / variance * (z - alpha * mean), log_density[:, 0]


def nearest(z: Tensor, data: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the squared distance of each z (B, D) to the nearest of `data` (N, D), (B,)."""
    parts = [torch.stack([torch.cdist(own, some).amin(1) for some in data.split(chunk)]).amin(0) for own in z.split(64)]
    return torch.cat(parts).square()
