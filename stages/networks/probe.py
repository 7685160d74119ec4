"""A probe classifier, trained on real images: its heads measure prompt accuracy, its features distances."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from stages.data.digits import LabelledImages
from stages.data.order import ShuffledOrder

FEATURES = 64


class Probe(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> features (B, 64) and, for each label, logits."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(FEATURES),
        )
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


def train_probe(data: LabelledImages, *, steps: int = 400, batch_size: int = 128, seed: int = 0) -> Probe:
    """Cross-entropy over all labels, images shifted by up to two pixels. The seed is fixed by default, so that
    every evaluation on one image set looks through the same eyes."""
    torch.manual_seed(seed)
    probe = Probe({name: int(values.max()) + 1 for name, values in data.labels.items()})
    images = torch.from_numpy(data.images)
    labels = {name: torch.from_numpy(values) for name, values in data.labels.items()}
    probe(images[:2])  # gives the lazy layer its shape
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-3)
    order = ShuffledOrder(len(data), batch_size, seed)
    for step in range(steps):
        index = order.batch(step)
        dx, dy = (int(d) for d in torch.randint(-2, 3, (2,)))
        _, logits = probe(images[index].roll((dy, dx), (2, 3)))
        loss = torch.stack([functional.cross_entropy(logits[name], labels[name][index]) for name in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval().requires_grad_(False)
