"""The numbers of a comparison."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stages.base import Progress
from stages.data import digits
from stages.evaluation.sides import BATCH, Setting, Side
from stages.metrics import distances
from stages.networks.probe import FEATURES, Probe, train_probe

FEATURE_NAME = f"digits_probe_{FEATURES}"


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
    metrics: dict[str, Any], sides: Sequence[Side], setting: Setting, size: int
) -> Generator[Progress, None, None]:
    """Add prompt accuracy, distances, precision, recall and diversity to each side of `metrics`, and the two
    references: other real images, and those through the VAE alone. All distances are at one number of samples."""
    probe = train_probe(digits.load(size))
    unseen = digits.load(size, held_out=True)
    metrics["probe_accuracy"] = _accuracy(probe.look(_batches(unseen.images))[1], unseen.labels)
    reference, other = _two_real_sets(size, len(setting.prompts))
    real, _ = probe.look(_batches(reference.images))
    rebuilt = (setting.teacher.decode(setting.teacher.encode(x)) for x in _batches(other.images))
    metrics["distance_samples"] = len(real)
    metrics["references"] = {
        name: _measure(probe, images, other.labels, other.captions, real)
        for name, images in (("real", _batches(other.images)), ("vae_reconstruction", rebuilt))
    }
    wanted = digits.caption_labels(setting.prompts)
    for done, side in enumerate(sides, 1):
        images = map(setting.teacher.decode, side.latents.split(BATCH))
        metrics["sides"][side.name] |= _measure(probe, images, wanted, setting.prompts, real)
        yield Progress(done, len(sides), "sides measured")


def _batches(images: np.ndarray) -> Iterator[torch.Tensor]:
    return iter(torch.from_numpy(images).split(BATCH))


def _two_real_sets(size: int, samples: int) -> tuple[digits.LabelledImages, digits.LabelledImages]:
    """Two random sets of real images that share no scan, neither larger than half of what there is."""
    images = digits.load(size)
    generator = np.random.default_rng(0)
    scans = len(images) // len(digits.COLOURS)
    in_first = generator.permutation(scans) < scans // 2
    index = generator.permutation(len(images))
    first, second = index[in_first[index % scans]], index[~in_first[index % scans]]
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
    accuracy = _accuracy(predicted, wanted)
    features, captions = features[: len(real)], captions[: len(real)]
    precision, recall = distances.precision_recall(real, features)
    figures = {
        "prompt_accuracy": accuracy,
        "prompt_accuracy_se": (accuracy * (1 - accuracy) / len(next(iter(predicted.values())))) ** 0.5,
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
