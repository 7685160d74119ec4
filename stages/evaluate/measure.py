"""Computes the metrics of an evaluation from what its workers measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.base import Artifact, Progress
from stages.data.images import digits
from stages.data.images.config import Digits
from stages.evaluate.parts import Measured
from stages.metrics import distances
from stages.metrics.protocols import SUBSET_SIZE, SUBSETS
from stages.probe import Probe
from stages.reference import Reference

STANDARD = {"inception": ("fid", True), "inception_patch": ("patch_fid", False), "dinov2": ("fd_dinov2", False)}
"""Features -> the name of their Fréchet distance, and whether KID, precision and recall are measured on them, too."""


def against_teacher(samples: Measured, side: str) -> dict[str, float]:
    """Return the seconds for an image, and the mean squared error to the teacher's full-step latents from the same
    noise.

    If the teacher is exact, also return the error to the nearest of its images."""
    figures = {"seconds_per_image": samples.about[0]["seconds"][side]}
    for name in ("latent_mse", "nearest_mse"):
        if f"{side}/{name}" in samples:
            figures |= _mean(name, samples[f"{side}/{name}"])
    return figures


def _mean(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    error = {f"{name}_se": float(values.std(ddof=1) / len(values) ** 0.5)} if len(values) > 1 else {}
    return {name: float(values.mean()), **error}


def against_real(metrics: dict[str, Any], samples: Measured, real: Measured, probe: Artifact) -> None:
    """Add the figures that need real images to `metrics`: distances, precision, recall, diversity and prompt accuracy.

    They are added to every side, and to two references: other real images, and their VAE reconstructions. Prompt
    accuracy needs prompts that name classes, and is left out for an unconditional teacher. All distances use the same
    number of samples.
    """
    assert isinstance(probe.stage, Probe)
    prompts = [prompt for about in samples.about for prompt in about["prompts"]]
    images, named = probe.stage.images, any(prompts)
    asked = digits.prompt_labels(prompts) if isinstance(images, Digits) and named else {}
    reference, origins = real["reference/features"], real["reference/origins"]
    metrics["features"] = f"{images.name}_probe_{reference.shape[1]}"
    metrics["probe_accuracy"] = probe.record["metrics"]["caption_accuracy"]
    metrics["distance_samples"] = len(reference)
    shown = {name: real[f"real/wanted/{name}"] for name in asked}
    captions = real.about[0]["captions"] if named else [""] * len(reference)  # diversity compares images of one prompt
    metrics["references"] = {
        name: _figures(real, name, shown, captions, reference, origins, real["real/origins"])
        for name in ("real", "vae_reconstruction")
    }
    if "vae_reconstruction/nearest_mse" in real:
        metrics["references"]["vae_reconstruction"] |= _mean("nearest_mse", real["vae_reconstruction/nearest_mse"])
    for side, figures in metrics["sides"].items():
        figures |= _figures(samples, side, asked, prompts, reference, origins)


def _figures(
    measured: Measured,
    side: str,
    wanted: Mapping[str, NDArray[np.int64]],
    captions: list[str],
    real: NDArray[np.float64],
    real_origins: NDArray[np.int64],
    origins: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Return the figures of one side or reference.

    wanted: label -> (N,), the classes that the prompts ask for. real: (N, F), features of the reference set.
    real_origins, origins: (N,), the originals that the reference images and those of `side` were made from; None if no
    two images share an original.
    """
    features = measured[f"{side}/features"]
    figures: dict[str, Any] = {}
    if wanted:
        seen = {name: measured[f"{side}/label/{name}"] == classes for name, classes in wanted.items()}
        right = float(np.logical_and.reduce(list(seen.values())).mean())
        spread = (right * (1 - right) / len(features)) ** 0.5
        figures |= {"prompt_accuracy": right, "prompt_accuracy_se": spread}
        figures |= {f"accuracy_of_{name}": float(found.mean()) for name, found in seen.items()}
    features, captions = features[: len(real)], captions[: len(real)]
    for name in ("frechet_distance", "kernel_distance"):
        distance = getattr(distances, name)
        error = distances.standard_error(distance, real, features, originals_of_a=real_origins, originals_of_b=origins)
        figures |= {name: distance(real, features), f"{name}_se": error}
    figures["precision"], figures["recall"] = distances.precision_recall(real, features)
    diversity = distances.diversity(features, captions)
    return figures if diversity is None else {**figures, "diversity": diversity}


def standard(
    metrics: dict[str, Any], samples: Measured, prompts: Measured, reference: Artifact
) -> Generator[Progress, None, None]:
    """Add the standard metrics to `metrics`, as far as the reference has the networks: FID, KID, precision and recall
    of Inception features, patch FID, the Fréchet distance of DINOv2 features, CLIP score and LPIPS diversity.

    prompts: the parts that compare images of one prompt."""
    about = reference.record["metrics"]
    assert isinstance(reference.stage, Reference)
    metrics["reference"] = {
        "preset": reference.stage.preset,
        "images": about["images"],
        "weights_sha256": about["weights_sha256"],
    }
    seen = [name for name in STANDARD if (reference.folder / f"{name}.npy").exists()]
    features = {name: np.load(reference.folder / f"{name}.npy").astype(np.float64) for name in seen}
    for done, (side, figures) in enumerate(metrics["sides"].items(), 1):
        for name, real in features.items():
            made = samples[f"{side}/{name}"].astype(np.float64)
            key, several = STANDARD[name]
            figures[key] = distances.frechet_distance(made, real)
            if several:
                figures |= _of_inception(made, real)
        for measured, key in ((samples, "clip_score"), (prompts, "lpips_diversity")):
            if f"{side}/{key}" in measured:
                figures |= _mean(key, measured[f"{side}/{key}"])
        yield Progress(done, len(metrics["sides"]), "sides measured")


def _of_inception(made: NDArray[np.float64], real: NDArray[np.float64]) -> dict[str, float]:
    kid = distances.kernel_distance_of_subsets(made, real, SUBSETS, min(SUBSET_SIZE, len(real), len(made)))
    precision, recall = distances.precision_recall(real, made)
    return {"kid": kid, "inception_precision": precision, "inception_recall": recall}
