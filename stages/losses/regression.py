"""Distances between two tensors of one shape that look at nothing but their difference."""

from __future__ import annotations

from torch import Tensor


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of each sample: (B, ...) -> (B,)."""
    return (output - target).abs().flatten(1).mean(1)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample: (B, ...) -> (B,)."""
    return (output - target).square().flatten(1).mean(1)


def pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    """sqrt(|d|^2 + c^2) - c over each sample's whole difference d, with c = 0.00054 sqrt(dimensions) (Song and
    Dhariwal 2023, 2310.14189, section 3.3), over sqrt(dimensions): (B, ...) -> (B,)."""
    difference = (output - target).flatten(1)
    dimensions = difference.shape[1]
    c = 0.00054 * dimensions**0.5
    return ((difference.square().sum(1) + c * c).sqrt() - c) / dimensions**0.5
