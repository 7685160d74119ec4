"""Trains the perceptual network as a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stages.networks.vgg import Classifier
from stages.training import Batch, Player, TrainingSettings, Turn

SHIFT = 16
"""Images are shifted by up to 1/SHIFT of their shorter side."""


class ClassificationTraining:
    """L = sum over labels of the cross-entropy. Images are randomly shifted and, with `mirror`, mirrored."""

    def __init__(self, classifier: Classifier, training: TrainingSettings, mirror: bool) -> None:
        self.classifier, self.mirror = classifier, mirror
        self.players = {"classifier": Player(classifier, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("classifier", self.loss)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: x (B, C, H, W), labels: name -> (B,) classes."""
        logits = self.classifier(_moved(batch["x"], self.mirror))
        labels = {name: values.to(batch["x"].device) for name, values in batch["labels"].items()}
        loss = torch.stack([functional.cross_entropy(logits[name], labels[name]) for name in labels]).sum()
        right = torch.stack([(logits[name].argmax(1) == labels[name]).float().mean() for name in labels])
        return loss, {"top_1": right.mean()}

    def after_step(self, step: int) -> None:
        pass


def _moved(x: Tensor, mirror: bool) -> Tensor:
    """Shift each sample by whole pixels, with reflected borders. With `mirror`, mirror it with probability 1/2."""
    n, _, height, width = x.shape
    by = min(height, width) // SHIFT
    padded = functional.pad(x, (by,) * 4, "reflect")
    top, left = torch.randint(0, 2 * by + 1, (2, n))
    moved = torch.stack([p[:, t : t + height, k : k + width] for p, t, k in zip(padded, top, left, strict=True)])
    if mirror:
        flipped = torch.rand(n) < 0.5
        moved[flipped] = moved[flipped].flip(-1)
    return moved


@torch.no_grad()
def top_1(classifier: Classifier, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, float]:
    """Return label -> accuracy of the most probable class, over all batches."""
    device = next(classifier.parameters()).device
    right: dict[str, list[Tensor]] = {}
    for x, labels in batches:
        for name, logits in classifier(x.to(device)).items():
            right.setdefault(name, []).append(logits.argmax(1).cpu() == labels[name])
    return {name: float(torch.cat(values).double().mean()) for name, values in right.items()}
