"""Distances between two tensors of the same shape that depend only on their difference."""

from __future__ import annotations

from torch import Tensor


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of each sample: (B, ...) -> (B,)."""
    return (output - target).abs().flatten(1).mean(1)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each sample: (B, ...) -> (B,)."""
    return (output - target).square().flatten(1).mean(1)


def pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    """Return (sqrt(|d|^2 + c^2) - c) / sqrt(D) of each sample: (B, ...) -> (B,).

    d is the difference of a sample, D its number of elements, and c = 0.00054 sqrt(D). Without the division by sqrt(D),
    it is the loss of Song and Dhariwal 2023, 2310.14189, section 3.3.
    """
    difference = (output - target).flatten(1)
    dimensions = difference.shape[1]
    c = 0.00054 * dimensions**0.5
    return ((difference.square().sum(1) + c * c).sqrt() - c) / dimensions**0.5
