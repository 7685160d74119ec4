"""The classifier of a probe. Its logits measure prompt accuracy, and its features measure distances of image sets."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from stages.base import Progress
from stages.data.images.labelled import LabelledImages
from stages.data.order import ShuffledOrder

FEATURES = 64
CHANNELS = (32, 64, 128)
LEARNING_RATE = 2e-3
WARM_UP = 0.05
TRAINED_AT_ONCE, SEEN_AT_ONCE = 128, 64
"""Images in a batch: in training, and in `look`."""
LOG_EVERY = 20
"""Training steps between two reports of progress."""
WEIGHTS, ABOUT = "classifier.safetensors", "classifier.json"


class Classifier(nn.Module):
    """A small convolutional classifier of images (B, 3, H, W) in [-1, 1].

    `classes` maps each label to its number of classes. Features (B, F) are normalised by a layer norm. Without it, a
    few outliers would dominate the distances."""

    def __init__(self, classes: dict[str, int], features: int = FEATURES) -> None:
        super().__init__()
        self.classes, self.features = classes, features
        layers: list[nn.Module] = [*_convolution(3, CHANNELS[0])]
        for before, channels in pairwise(CHANNELS):
            layers += [*_convolution(before, channels, stride=2), *_convolution(channels, channels)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(features), nn.LayerNorm(features))
        self.heads = nn.ModuleDict({name: nn.Linear(features, count) for name, count in classes.items()})

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> Classifier:
        """Load the classifier that was saved to `folder`, frozen, to `device`."""
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        classifier = cls(about["classes"], about["features"])
        classifier.load_state_dict(load_file(folder / WEIGHTS))
        return classifier.to(device).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write classifier.safetensors and classifier.json to `folder`."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        about = {"classes": self.classes, "features": self.features}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return features (B, F), and label -> logits (B, number of classes)."""
        features = self.trunk(images)
        return features, {name: head(functional.relu(features)) for name, head in self.heads.items()}

    @torch.no_grad()
    def look(self, batches: Iterable[Tensor]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int64]]]:
        """Return features (N, F), float64, and label -> predicted class (N,), of all images in `batches`."""
        device = next(self.parameters()).device
        seen = [self(images.to(device)) for images in batches]
        features = torch.cat([f for f, _ in seen]).cpu().double().numpy()
        return features, {name: torch.cat([p[name] for _, p in seen]).argmax(1).cpu().numpy() for name in self.heads}


def _convolution(inputs: int, channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    """Return a 3x3 convolution, a group norm and a ReLU."""
    return nn.Conv2d(inputs, channels, 3, stride, padding=1), nn.GroupNorm(8, channels), nn.ReLU()


def batches(images: LabelledImages) -> Iterator[Tensor]:
    """Yield all images in order, in batches for `look`."""
    for start in range(0, len(images), SEEN_AT_ONCE):
        yield torch.from_numpy(images.pixels(slice(start, start + SEEN_AT_ONCE)))


def accuracy(predicted: Mapping[str, NDArray[np.int64]], wanted: Mapping[str, NDArray[np.int64]]) -> float:
    """Return the share of images for which the predicted class of every label in `wanted` is right."""
    return float(np.logical_and.reduce([predicted[name] == wanted[name] for name in wanted]).mean())


def train_probe(data: LabelledImages, *, steps: int, seed: int, device: str) -> Generator[Progress, None, Classifier]:
    """Train a probe on `data` by the sum of the cross-entropies of all labels. Returns it frozen.

    Each batch is shifted by at most one pixel in each direction. The learning rate rises linearly and then falls to
    zero."""
    torch.manual_seed(seed)
    classifier = Classifier({name: int(values.max()) + 1 for name, values in data.labels.items()})
    classifier(torch.from_numpy(data.pixels(slice(0, 2))))  # initialises the lazy layer
    classifier.to(device)
    labels = {name: torch.from_numpy(values) for name, values in data.labels.items()}
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=WARM_UP, cycle_momentum=False
    )
    order = ShuffledOrder(len(data), TRAINED_AT_ONCE, seed)
    started = time.monotonic()
    for step in range(steps):
        index = order.batch(step)
        dx, dy = (int(d) for d in torch.randint(-1, 2, (2,)))
        _, logits = classifier(torch.from_numpy(data.pixels(index)).roll((dy, dx), (2, 3)).to(device))
        wanted = {name: values[index].to(device) for name, values in labels.items()}
        loss = torch.stack([functional.cross_entropy(logits[name], wanted[name]) for name in logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            rate = done / (time.monotonic() - started)
            yield Progress(done, steps, "steps", {"loss": float(loss.detach()), "per_second": rate})
    return classifier.eval().requires_grad_(False)
