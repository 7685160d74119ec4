"""The numbers of a comparison."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.base import Progress
from stages.data.images import digits
from stages.data.images.config import Digits, ImageSet
from stages.data.images.labelled import LabelledImages
from stages.data.images.load import load
from stages.evaluation.sides import BATCH, Setting, Side
from stages.metrics import distances
from stages.networks.probe import FEATURES, Probe, train_probe

REAL_LIMIT = 20_000
"""Real images that a probe is trained on, at most."""


def against_teacher(side: Side, teacher: Side) -> dict[str, Any]:
    """Mean squared error to the teacher's own latents from the same noise, and the cost of both."""
    errors = (side.latents - teacher.latents).square().mean((1, 2, 3)).double()
    return {
        "network_calls": side.calls,
        "seconds_per_image": side.seconds,
        "latent_mse": float(errors.mean()),
        "latent_mse_se": float(errors.std() / len(errors) ** 0.5),
    }


def against_real(
    metrics: dict[str, Any], sides: Sequence[Side], setting: Setting, real_set: ImageSet, scratch: Path
) -> Generator[Progress, None, None]:
    """Add distances, precision, recall, diversity and, where prompts say classes, prompt accuracy to each side of
    `metrics`, and the two references: other real images, and those through the VAE alone. All distances are at one
    number of samples."""
    size = setting.teacher.decode(torch.zeros(1, *setting.teacher.latent_shape)).shape[-2:]
    if size != (real_set.size, real_set.size):
        raise ValueError(f"its images are {real_set.size} pixels wide, the teacher's {size[1]} x {size[0]}")
    seen = load(real_set, limit=REAL_LIMIT, scratch=scratch)
    unseen = load(real_set, held_out=True, limit=REAL_LIMIT, scratch=scratch)
    probe = train_probe(seen)
    metrics["features"] = f"{real_set.name}_probe_{FEATURES}"
    asked = digits.prompt_labels(setting.prompts) if isinstance(real_set, Digits) else {}
    heads = asked or unseen.labels
    metrics["probe_accuracy"] = _accuracy(probe.look(_batches(unseen))[1], {n: unseen.labels[n] for n in heads})
    reference, other = _two_real_sets(seen, len(setting.prompts))
    real, _ = probe.look(_batches(reference))
    rebuilt = (setting.teacher.decode(setting.teacher.encode(x)) for x in _batches(other))
    metrics["distance_samples"] = len(real)
    shown = {name: other.labels[name] for name in asked}
    metrics["references"] = {
        name: _measure(probe, images, shown, other.captions, real)
        for name, images in (("real", _batches(other)), ("vae_reconstruction", rebuilt))
    }
    for done, side in enumerate(sides, 1):
        images = map(setting.teacher.decode, side.latents.split(BATCH))
        metrics["sides"][side.name] |= _measure(probe, images, asked, setting.prompts, real)
        yield Progress(done, len(sides), "sides measured")


def _batches(images: LabelledImages) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(images.pixels(slice(start, start + BATCH)))


def _two_real_sets(images: LabelledImages, samples: int) -> tuple[LabelledImages, LabelledImages]:
    """Two random sets of real images that share no original, neither larger than half of what there is. Scenes count
    as originals, though all are composed of the same scans and photographs: a teacher's samples are, too."""
    generator = np.random.default_rng(0)
    originals = int(images.origins.max()) + 1
    in_first = generator.permutation(originals) < originals // 2
    index = generator.permutation(len(images))
    first, second = index[in_first[images.origins[index]]], index[~in_first[images.origins[index]]]
    n = min(samples, len(first), len(second))
    return images.take(first[:n]), images.take(second[:n])


def _measure(
    probe: Probe,
    images: Iterable[torch.Tensor],
    wanted: dict[str, np.ndarray],
    captions: list[str],
    real: np.ndarray,
) -> dict[str, Any]:
    features, predicted = probe.look(images)
    figures: dict[str, Any] = {}
    if wanted:
        accuracy = _accuracy(predicted, wanted)
        spread = (accuracy * (1 - accuracy) / len(features)) ** 0.5
        figures |= {"prompt_accuracy": accuracy, "prompt_accuracy_se": spread}
    features, captions = features[: len(real)], captions[: len(real)]
    precision, recall = distances.precision_recall(real, features)
    figures |= {
        "frechet_distance": distances.frechet_distance(real, features),
        "frechet_distance_se": distances.standard_error(distances.frechet_distance, real, features),
        "kernel_distance": distances.kernel_distance(real, features),
        "kernel_distance_se": distances.standard_error(distances.kernel_distance, real, features),
        "precision": precision,
        "recall": recall,
    }
    diversity = distances.diversity(features, captions)
    return figures if diversity is None else {**figures, "diversity": diversity}


def _accuracy(predicted: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Share of images in which every label is as wanted."""
    return float(np.logical_and.reduce([predicted[name] == wanted[name] for name in wanted]).mean())
