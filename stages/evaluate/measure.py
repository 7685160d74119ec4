"""Computes the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.base import Artifact, Progress, StageError
from stages.data.images import digits
from stages.data.images.config import Digits
from stages.data.images.labelled import LabelledImages
from stages.evaluate.config import MIN_SAMPLES
from stages.evaluate.sides import Setting, Side
from stages.metrics import distances
from stages.networks.adapter import Adapter
from stages.networks.exact import Exact
from stages.networks.probe import SEEN_AT_ONCE, Classifier, accuracy, batches
from stages.probe import Probe


class RealSets(NamedTuple):
    """Two equally large sets of real images that share no original.

    All distances are measured to `reference`. `other` is measured like generated images, as a baseline.
    """

    reference: LabelledImages
    other: LabelledImages


def against_teacher(side: Side, full: Side, teacher: Adapter) -> dict[str, Any]:
    """Return the cost of the side, and the mean squared error to the teacher's full-step latents from the same noise.

    If the teacher is exact, also return the error to the nearest of its images."""
    errors = (side.latents - full.latents).square().mean((1, 2, 3)).double()
    return {
        "network_calls": side.calls,
        "seconds_per_image": side.seconds,
        **_mean("latent_mse", errors),
        **_nearest(side.latents, teacher),
    }


def _nearest(latents: Tensor, teacher: Adapter) -> dict[str, float]:
    return _mean("nearest_mse", teacher.nearest(latents)) if isinstance(teacher, Exact) else {}


def _mean(name: str, values: Tensor) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_se": float(values.std() / len(values) ** 0.5)}


def against_real(
    metrics: dict[str, Any], sides: Sequence[Side], setting: Setting, probe: Artifact, images: RealSets
) -> Generator[Progress, None, None]:
    """Add the figures that need real images to `metrics`: distances, precision, recall, diversity and prompt accuracy.

    They are added to every side, and to two references: other real images, and their VAE reconstructions. Prompt
    accuracy needs prompts that name classes, and is left out for an unconditional teacher. All distances use the same
    number of samples. The probe must not have been trained on `images`. Raises ValueError if the teacher's images have
    another size than the probe's.
    """
    assert isinstance(probe.stage, Probe)
    real_set = probe.stage.images
    size = setting.teacher.decode(torch.zeros(1, *setting.teacher.latent_shape)).shape[-2:]
    if size != (real_set.size, real_set.size):
        raise ValueError(f"the probe's images are {real_set.size} pixels wide, the teacher's {size[1]} x {size[0]}")
    classifier = Classifier.load(probe.folder, setting.teacher.device)
    metrics["features"] = f"{real_set.name}_probe_{classifier.features}"
    metrics["probe_accuracy"] = probe.record["metrics"]["caption_accuracy"]
    asked = digits.prompt_labels(setting.prompts) if isinstance(real_set, Digits) and any(setting.prompts) else {}
    reference, other = images
    real, _ = classifier.look(batches(reference))
    latents = torch.cat([setting.teacher.encode(x).cpu() for x in batches(other)])
    rebuilt = map(setting.teacher.decode, latents.split(SEEN_AT_ONCE))
    metrics["distance_samples"] = len(real)
    shown = {name: other.labels[name] for name in asked}
    captions = other.captions if any(setting.prompts) else [""] * len(other)  # diversity compares images of one prompt
    metrics["references"] = {
        name: _measure(classifier, made, shown, captions, real, reference.origins, other.origins)
        for name, made in (("real", batches(other)), ("vae_reconstruction", rebuilt))
    }
    metrics["references"]["vae_reconstruction"] |= _nearest(latents, setting.teacher)
    for done, side in enumerate(sides, 1):
        made = map(setting.teacher.decode, side.latents.split(SEEN_AT_ONCE))
        metrics["sides"][side.name] |= _measure(classifier, made, asked, setting.prompts, real, reference.origins)
        yield Progress(done, len(sides), "sides measured")


def two_real_sets(images: LabelledImages, samples: int) -> RealSets:
    """Draw two random sets of equal size that share no original, with `samples` images each if there are enough.

    Every image of composed scenes counts as an original, although scenes share scans and photographs: the samples of a
    teacher share them, too. Raises StageError if a set has fewer than MIN_SAMPLES images.
    """
    generator = np.random.default_rng(0)
    known, original = np.unique(images.origins, return_inverse=True)
    in_first = generator.permutation(len(known)) < len(known) // 2
    index = generator.permutation(len(images))
    first, second = index[in_first[original[index]]], index[~in_first[original[index]]]
    n = min(samples, len(first), len(second))
    if n < MIN_SAMPLES:
        raise StageError(
            f"the probe holds out {len(images)} real images, which make two sets of {n}; distances need at least "
            f"{MIN_SAMPLES} in each. Raise the probe's `limit`, hold out more (images.hold_out_every), or give it more "
            "images"
        )
    return RealSets(images.take(first[:n]), images.take(second[:n]))


def _measure(
    classifier: Classifier,
    images: Iterable[Tensor],
    wanted: dict[str, np.ndarray],
    captions: list[str],
    real: np.ndarray,
    real_origins: np.ndarray,
    origins: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the figures of one side or reference.

    wanted: label -> (N,), the classes that the prompts ask for. real: (N, F), features of the reference set.
    real_origins, origins: (N,), the originals that the reference images and `images` were made from; None if no two
    images share an original.
    """
    features, predicted = classifier.look(images)
    figures: dict[str, Any] = {}
    if wanted:
        right = accuracy(predicted, wanted)
        spread = (right * (1 - right) / len(features)) ** 0.5
        figures |= {"prompt_accuracy": right, "prompt_accuracy_se": spread}
        figures |= {f"accuracy_of_{name}": accuracy(predicted, {name: classes}) for name, classes in wanted.items()}
    features, captions = features[: len(real)], captions[: len(real)]
    for name in ("frechet_distance", "kernel_distance"):
        distance = getattr(distances, name)
        error = distances.standard_error(distance, real, features, originals_of_a=real_origins, originals_of_b=origins)
        figures |= {name: distance(real, features), f"{name}_se": error}
    figures["precision"], figures["recall"] = distances.precision_recall(real, features)
    diversity = distances.diversity(features, captions)
    return figures if diversity is None else {**figures, "diversity": diversity}
