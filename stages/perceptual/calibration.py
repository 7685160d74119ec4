"""Calibrates a perceptual distance on triplets of images with votes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.networks.perceptual import LPIPS, unit
from stages.training import Batch, Player, TrainingSettings, Turn

HIDDEN = 32
SMALL = 0.1
"""Added to denominators, so that ratios of distances stay finite."""


class Heads(nn.Module):
    """The trained parameters: a weight for each channel of each tap (uniform at first), and the ranker.

    The ranker predicts a vote from two distances. It is only used in training.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((1, c, 1, 1), c**-0.5)) for c in channels])
        self.ranker = nn.Sequential(
            *(nn.Linear(5, HIDDEN), nn.LeakyReLU(0.2)),
            *(nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2)),
            nn.Linear(HIDDEN, 1),
        )

    def forward(self, d0: Tensor, d1: Tensor) -> Tensor:
        """Return logits (B,) that the second image is the closer one. d0, d1: (B,), the distances of both images."""
        seen = torch.stack([d0, d1, d0 - d1, d0 / (d1 + SMALL), d1 / (d0 + SMALL)], 1)
        logits: Tensor = self.ranker(seen)[:, 0]
        return logits


class CalibrationTraining:
    """Trains the heads on a frozen trunk, with the binary cross-entropy between the ranker's output and the votes.

    Weights are clamped to be non-negative. Source: Zhang et al. 2018, 1801.03924, section 4, variant "lin".
    """

    def __init__(self, metric: LPIPS, heads: Heads, training: TrainingSettings, dropout: float) -> None:
        self.metric, self.heads, self.dropout = metric, heads, dropout
        self.players = {"heads": Player(heads, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("heads", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: reference, first, second, each (B, C, H, W); votes (B,), the share of people who chose second."""
        self.metric.check(batch["reference"], batch["first"])
        with torch.no_grad():
            reference = [unit(f) for f in self.metric.features(batch["reference"])]
        d0, d1 = (self._distance(reference, batch[name]) for name in ("first", "second"))
        loss = functional.binary_cross_entropy_with_logits(self.heads(d0, d1), batch["votes"])
        agrees = ((d1 < d0).float() * batch["votes"] + (d0 < d1).float() * (1 - batch["votes"])).mean()
        return loss, {"agreement": agrees}

    def _distance(self, reference: list[Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            squares = [(r - unit(f)).square() for r, f in zip(reference, self.metric.features(x), strict=True)]
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                functional.conv2d(functional.dropout(square, self.dropout), weight).mean((1, 2, 3))
                for square, weight in zip(squares, self.heads.weights, strict=True)
            ]
            return torch.stack(parts).sum(0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for weight in self.heads.weights:
            weight.clamp_(min=0)
