"""The numbers of a comparison."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from stages.base import Progress
from stages.data import digits
from stages.evaluation.sides import Setting, Side
from stages.metrics import distances
from stages.networks.probe import FEATURES, Probe, train_probe

FEATURE_NAME = f"digits_probe_{FEATURES}"


def against_teacher(side: Side, teacher: Side) -> dict[str, Any]:
    """Mean squared error to the teacher's own output from the same noise, in latents and in pixels."""
    errors = (side.latents - teacher.latents).square().mean((1, 2, 3)).double()
    return {
        "network_calls": side.calls,
        "seconds_per_image": side.seconds,
        "latent_mse": float(errors.mean()),
        "latent_mse_se": float(errors.std() / len(errors) ** 0.5),
        "pixel_mse": float((side.images - teacher.images).square().mean()),
    }


def against_real(
    metrics: dict[str, Any], sides: Sequence[Side], setting: Setting, samples: int
) -> Generator[Progress, None, None]:
    """Add prompt accuracy, distances, precision, recall and diversity to each side of `metrics`, and the
    two references at this number of samples: other real images, and those through the VAE alone."""
    probe = train_probe(digits.load(setting_size(sides)))
    unseen = digits.load(setting_size(sides), held_out=True)
    _, predicted = probe.look(torch.from_numpy(unseen.images))
    metrics["probe_accuracy"] = _accuracy(predicted, unseen.labels)
    wanted = digits.caption_labels(setting.prompts)
    reference, other = _two_real_sets(setting_size(sides), samples)
    real, _ = probe.look(torch.from_numpy(reference.images))

    rebuilt = setting.teacher.decode(setting.teacher.encode(torch.from_numpy(other.images)))
    metrics["references"] = {}
    for name, images in (("real", torch.from_numpy(other.images)), ("vae_reconstruction", rebuilt)):
        metrics["references"][name] = _measure(probe, images, other.labels, other.captions, real)
    for done, side in enumerate(sides, 1):
        metrics["sides"][side.name] |= _measure(probe, side.images, wanted, setting.prompts, real)
        yield Progress(done, len(sides), "sides measured")


def setting_size(sides: Sequence[Side]) -> int:
    return int(sides[0].images.shape[-1])


def _two_real_sets(size: int, samples: int) -> tuple[digits.LabelledImages, digits.LabelledImages]:
    """Two disjoint random sets of real images, neither larger than half of what there is."""
    images = digits.load(size)
    n = min(samples, len(images) // 2)
    index = np.random.default_rng(0).permutation(len(images))
    return images.take(index[:n]), images.take(index[n : 2 * n])


def _measure(
    probe: Probe, images: torch.Tensor, wanted: dict[str, np.ndarray], captions: list[str], real: np.ndarray
) -> dict[str, Any]:
    features, predicted = probe.look(images)
    precision, recall = distances.precision_recall(real, features)
    accuracy = _accuracy(predicted, wanted)
    return {
        "prompt_accuracy": accuracy,
        "prompt_accuracy_se": (accuracy * (1 - accuracy) / len(features)) ** 0.5,
        "frechet_distance": distances.frechet_distance(real, features),
        "frechet_distance_se": distances.standard_error(distances.frechet_distance, real, features),
        "kernel_distance": distances.kernel_distance(real, features),
        "kernel_distance_se": distances.standard_error(distances.kernel_distance, real, features),
        "precision": precision,
        "recall": recall,
        "diversity": distances.diversity(features, captions),
    }


def _accuracy(predicted: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Share of images in which every label is as wanted."""
    return float(np.logical_and.reduce([predicted[name] == wanted[name] for name in wanted]).mean())
