"""A probe classifier, trained on real images: its heads measure prompt accuracy, its features distances."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from stages.data.images.labelled import LabelledImages
from stages.data.order import ShuffledOrder

FEATURES = 64
CHANNELS = (32, 64, 128)
LEARNING_RATE = 2e-3
WARM_UP = 0.05


class Probe(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, 64) and, for each label, logits. Features are normalised: a few
    images far from all others would otherwise decide every distance."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, CHANNELS[0])]
        for before, channels in pairwise(CHANNELS):
            layers += [*_convolution(before, channels, stride=2), *_convolution(channels, channels)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(FEATURES), nn.LayerNorm(FEATURES))
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in classes.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.trunk(images)
        return features, {name: head(functional.relu(features)) for name, head in self.heads.items()}

    @torch.no_grad()
    def look(self, batches: Iterable[Tensor]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
        """Features (N, 64) in float64, and the predicted class (N,) of each label, over all batches."""
        seen = [self(images) for images in batches]
        features = torch.cat([f for f, _ in seen]).double().numpy()
        return features, {name: torch.cat([p[name] for _, p in seen]).argmax(1).numpy() for name in self.heads}


def _convolution(inputs: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, channels, 3, stride, padding=1), nn.GroupNorm(8, channels), nn.ReLU()


def train_probe(data: LabelledImages, *, steps: int = 1200, batch_size: int = 128, seed: int = 0) -> Probe:
    """Cross-entropy over all labels, images shifted by up to one pixel, the rate falling to zero. The seed is fixed
    by default, so that every evaluation on one image set looks through the same eyes."""
    torch.manual_seed(seed)
    probe = Probe({name: int(values.max()) + 1 for name, values in data.labels.items()})
    labels = {name: torch.from_numpy(values) for name, values in data.labels.items()}
    probe(torch.from_numpy(data.pixels(slice(0, 2))))  # gives the lazy layer its shape
    optimizer = torch.optim.Adam(probe.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=WARM_UP, cycle_momentum=False
    )
    order = ShuffledOrder(len(data), batch_size, seed)
    for step in range(steps):
        index = order.batch(step)
        dx, dy = (int(d) for d in torch.randint(-1, 2, (2,)))
        _, logits = probe(torch.from_numpy(data.pixels(index)).roll((dy, dx), (2, 3)))
        loss = torch.stack([functional.cross_entropy(logits[name], labels[name][index]) for name in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval().requires_grad_(False)
