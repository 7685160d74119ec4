"""The last layer of a student whose output means something else than its teacher's."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from stages.diffusion.prediction import Prediction, StudentPrediction

log = logging.getLogger(__name__)

FACTORS = {
    ("v_prediction", "sample"): (-1.0,),
    ("v_prediction", "epsilon"): (0.0,),
    ("v_prediction", "both"): (-1.0, 1.0),
    ("epsilon", "v_prediction"): (0.0,),
    ("epsilon", "sample"): (0.0,),
    ("epsilon", "both"): (0.0, 1.0),
    ("sample", "v_prediction"): (-1.0,),
    ("sample", "epsilon"): (0.0,),
    ("sample", "both"): (1.0, 0.0),
}
"""(teacher's prediction type, student's) -> what the teacher's last layer is multiplied by, for each output of the
student. Equal types keep the layer. v is -x0 in pure noise. No multiple of the layer turns epsilon into v or x0, or v
or x0 into epsilon, because z does not reach it: such an output begins at 0."""

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties that are tried, relative to the mean squared feature."""

WITHIN = 1.1
"""A larger penalty is taken if its error is at most so many times the least. Its weights are smaller, and training from
them goes faster: see tests/benchmarks/first_layer.py. A choice of Retort's."""


def begins_at_zero(teacher: Prediction, student: StudentPrediction) -> bool:
    """Whether a student of this prediction type can use nothing of its teacher's last layer."""
    return FACTORS.get((teacher, student)) == (0.0,)


def convert(unet: Any, teacher: Prediction, student: StudentPrediction) -> Any:
    """`unet`, a copy of the teacher's, with the last layer of a student: see FACTORS."""
    factors = FACTORS.get((teacher, student), (1.0,))
    if len(factors) == 1:
        with torch.no_grad():
            for parameter in unet.conv_out.parameters():
                parameter.mul_(factors[0])
        return unet
    config = {**unet.config, "out_channels": unet.config["out_channels"] * len(factors)}
    config.pop("_use_default_values", None)  # from_config would take the class's defaults for what stands in this list
    wide = type(unet).from_config(config).to(next(unet.parameters()).device)
    weights = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([factor * weights[name] for factor in factors])
    wide.load_state_dict(weights)
    return wide


class _Squares:
    """What the squared error of any weights on some samples follows from, however many the samples are."""

    def __init__(self, layer: nn.Conv2d) -> None:
        inputs = layer.weight[0].numel() + 1  # the last is the bias's
        empty = layer.weight.new_zeros(inputs, inputs + layer.out_channels, dtype=torch.float64)
        self.gram, self.moments = empty[:, :inputs], empty[:, inputs:]
        self.square, self.count = 0.0, 0

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """rows (N, inputs), wanted (N, D)."""
        self.gram += rows.mT @ rows
        self.moments += rows.mT @ wanted
        self.square += float(wanted.double().square().sum())
        self.count += wanted.numel()

    def ridge(self, penalty: float) -> Tensor:
        """The weights (inputs, D) of least squared error plus `penalty` times the mean squared input."""
        scale = self.gram.diagonal().mean() * torch.eye(len(self.gram)).to(self.gram)
        return torch.linalg.solve(self.gram + penalty * scale, self.moments)

    def error(self, weights: Tensor) -> float:
        """Mean squared error of weights (inputs, D)."""
        explained = (weights * (self.gram @ weights - 2 * self.moments)).sum()
        return (self.square + float(explained)) / self.count


@torch.no_grad()
def fit(layer: nn.Conv2d, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give `layer` weights that map features (B, C, H, W) to targets (B, D, H, W) with little squared error.

    Ridge regression on every other sample; the rest choose among the penalties RIDGES and, as the largest, zeros: see
    WITHIN. The layer is a 3x3 convolution with padding 1, as diffusers' U-Nets have it, and so linear in the patches of
    its input. A single sample leaves the layer as it is. Raises ValueError if features or targets are not finite.
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
        raise ValueError("the teacher's features, or the pairs, are not finite: see `retort stats` for the pairs")
    best = [name for name, error in errors.items() if error <= WITHIN * min(errors.values())][-1]
    weights = candidates[best].T.to(layer.weight.dtype)
    layer.weight.copy_(weights[:, :-1].view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(weights[:, -1])
    tried = ", ".join(f"{name} {error:.4g}" for name, error in errors.items())
    log.info("the student's last layer begins with %s; mean squared errors on other pairs: %s", best, tried)
