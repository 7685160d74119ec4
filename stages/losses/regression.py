"""Distances between two tensors of one shape, averaged over all elements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

RegressionLoss = Literal["l1", "mse", "pseudo_huber"]


def regression_loss(name: RegressionLoss, output: Tensor, target: Tensor) -> Tensor:
    """`l1`, `mse`, or `pseudo_huber`: sqrt(|d|^2 + c^2) - c over each sample's whole difference d, with
    c = 0.00054 sqrt(dimensions) (Song and Dhariwal 2023, 2310.14189, section 3.3), over sqrt(dimensions)."""
    difference = (output - target).flatten(1)
    if name == "l1":
        return difference.abs().mean()
    if name == "mse":
        return difference.square().mean()
    dimensions = difference.shape[1]
    c = 0.00054 * dimensions**0.5
    return ((difference.square().sum(1) + c * c).sqrt() - c).mean() / dimensions**0.5
