"""The initial last layer of a student whose prediction type differs from its teacher's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from stages.diffusion.prediction import Prediction, StudentPrediction
from stages.networks.compute import remade

log = logging.getLogger(__name__)

FACTORS = {
    ("v_prediction", "sample"): (-1.0,),
    ("v_prediction", "both"): (-1.0, 1.0),
    ("epsilon", "both"): (0.0, 1.0),
    ("sample", "v_prediction"): (-1.0,),
    ("sample", "both"): (1.0, 0.0),
}
"""(teacher's prediction type, student's) -> the factor of the teacher's last layer for each output of the student.

The student's last layer is initialised with the teacher's, multiplied by the factor. If the types are equal, the factor
is 1. v is -x0 in pure noise, so v and x0 differ by the factor -1 there. Other conversions need z, which is not an input
of the last layer: epsilon to v or x0, v or x0 to epsilon, and u to any other type. Their factor is 0."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The ridge penalties that `fit` tries, relative to the mean squared feature."""

WITHIN = 1.1
"""`fit` takes the largest penalty whose error is at most WITHIN times the smallest error. Larger penalties give smaller
weights, from which training is faster. The value was chosen by tests/benchmarks/first_layer.py."""


def begins_at_zero(teacher: Prediction, student: StudentPrediction) -> bool:
    """Whether all factors are 0, so that the student's last layer is initialised with zeros."""
    return not any(_factors(teacher, student))


def _factors(teacher: Prediction, student: StudentPrediction) -> tuple[float, ...]:
    nothing = (0.0, 0.0) if student == "both" else (0.0,)
    return (1.0,) if teacher == student else FACTORS.get((teacher, student), nothing)


def convert(network: Any, head: str, teacher: Prediction, student: StudentPrediction) -> Any:
    """Convert the last layer of `network`, a copy of the teacher's, to the student's prediction type by FACTORS.

    `head` is the name of that layer. For `both`, return a new network with twice the output channels: x0, then noise.
    Otherwise the network is changed in place."""
    factors = _factors(teacher, student)
    if len(factors) == 1:
        with torch.no_grad():
            for parameter in network.get_submodule(head).parameters():
                parameter.mul_(factors[0])
        return network
    wide = remade(network, out_channels=network.config["out_channels"] * len(factors))
    weights = network.state_dict()
    for name in (f"{head}.weight", f"{head}.bias"):
        weights[name] = torch.cat([factor * weights[name] for factor in factors])
    wide.load_state_dict(weights)
    return wide


class _Squares:
    """Sums over samples from which the squared error of any weights can be computed. Their size is constant."""

    def __init__(self, layer: nn.Conv2d) -> None:
        inputs = layer.weight[0].numel() + 1  # the last input is 1, for the bias
        empty = layer.weight.new_zeros(inputs, inputs + layer.out_channels, dtype=torch.float64)
        self.gram, self.moments = empty[:, :inputs], empty[:, inputs:]
        self.square, self.count = 0.0, 0

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Add samples: rows (N, inputs) and targets `wanted` (N, D)."""
        self.gram += rows.mT @ rows
        self.moments += rows.mT @ wanted
        self.square += float(wanted.double().square().sum())
        self.count += wanted.numel()

    def ridge(self, penalty: float) -> Tensor:
        """Return the ridge regression weights (inputs, D). `penalty` is relative to the mean squared input."""
        scale = self.gram.diagonal().mean() * torch.eye(len(self.gram)).to(self.gram)
        return torch.linalg.solve(self.gram + penalty * scale, self.moments)

    def error(self, weights: Tensor) -> float:
        """Return the mean squared error of weights (inputs, D) on the samples."""
        explained = (weights * (self.gram @ weights - 2 * self.moments)).sum()
        return (self.square + float(explained)) / self.count


@torch.no_grad()
def fit(layer: nn.Conv2d, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit the weights of `layer` by ridge regression to map features (B, C, H, W) to targets (B, D, H, W).

    `batches` yields (features, targets). `layer` is a 3x3 convolution with padding 1 and a bias, as in diffusers'
    U-Nets. It is linear in the 3x3 patches of its input.

    Half of the samples, every other one, are fitted. The error on the other half selects one of the penalties RIDGES,
    or zero weights, which count as the largest penalty: see WITHIN. If there is only one sample, the layer is not
    changed. Raises ValueError if features or targets are not finite.
    """
    halves = _Squares(layer), _Squares(layer)
    for features, targets in batches:
        for number, (sample, wanted) in enumerate(zip(features, targets, strict=True)):
            patches = unfold(sample[None], 3, padding=1)[0].mT
            rows = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
            halves[number % 2].add(rows, wanted.flatten(1).mT)
    fitted, others = halves
    if not others.count:
        return
    candidates = {f"ridge {penalty:g}": fitted.ridge(penalty) for penalty in RIDGES}
    candidates["zeros"] = torch.zeros_like(fitted.moments)
    errors = {name: others.error(weights) for name, weights in candidates.items()}
    if not all(map(isfinite, errors.values())):
        raise ValueError("the teacher's features, or the pairs, are not finite: check the pairs with `retort stats`")
    best = [name for name, error in errors.items() if error <= WITHIN * min(errors.values())][-1]
    weights = candidates[best].T.to(layer.weight.dtype)
    layer.weight.copy_(weights[:, :-1].view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(weights[:, -1])
    tried = ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    log.info("the student's last layer is initialised by %s; mean squared errors on other pairs: %s", best, tried)
