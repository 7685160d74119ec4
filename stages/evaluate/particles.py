"""Measures optimised particles beside samples of their teacher."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.base import Artifact, Progress
from stages.data.images import digits
from stages.data.images.config import Digits
from stages.data.noise import noise_for
from stages.diffusion.config import Sampler
from stages.evaluate import page
from stages.evaluate.config import EvaluationExecution
from stages.metrics import distances, images
from stages.networks.adapter import Adapter
from stages.networks.compute import prepare
from stages.networks.exact import Exact
from stages.networks.probe import SEEN_AT_ONCE, Classifier, accuracy
from stages.networks.teachers import load_network, solve
from stages.optimize import Optimize
from stages.optimize.config import RepresentationMaterials
from stages.probe import Probe
from stages.training.players import PREVIEWS

SIDES = 4
"""The number of sides from which a solid particle is seen."""


def evaluate_particles(
    particles: Artifact,
    sampler: Sampler,
    probe: Artifact | None,
    execution: EvaluationExecution,
    seed: int,
    output: Path,
    threads: int,
) -> Generator[Progress, None, dict[str, Any]]:
    """Write `metrics.json` and the files of `page.write` to `output`. Return the metrics.

    The teacher's row has as many samples as `particles`, of the same prompt, from noises of `seed`. Diversity and
    distance are measured between particles seen from the same side."""
    prepare(threads)
    stage, teacher = particles.stage, particles.inputs["teacher"]
    assert isinstance(stage, Optimize)
    adapter = load_network(teacher.folder, execution)
    objects = stage.representation.create(RepresentationMaterials(adapter, stage.particles, particles.folder))
    objects.load(particles.folder)
    views = objects.fixed(stage.particles * (SIDES if objects.solid else 1))
    count = len(views.particles)
    side = np.zeros(count, dtype=np.int64)
    if views.cameras:
        side = np.unique(views.cameras.azimuth.numpy(), return_inverse=True)[1]
    noise = np.stack([noise_for(seed, i, adapter.latent_shape, np.dtype(np.float32)) for i in range(count)])
    drawn = []
    with adapter.inference():
        for start in range(0, count, execution.micro_batch):
            rows = noise[start : start + execution.micro_batch]
            drawn.append(adapter.decode(solve(adapter, rows, [stage.prompt] * len(rows), sampler)))
            yield Progress(start + len(rows), count, "samples")
    shown = {
        f"teacher_{sampler.steps}": torch.cat(drawn),
        "particles": _as_the_teachers(objects.images(views), adapter),
    }
    metrics: dict[str, Any] = {
        "samples": count,
        "student": None,
        "particles": particles.fingerprint,
        "dtype": "float32",
        "micro_batch": min(execution.micro_batch, count),
        "sides": {name: _figures(made, side, adapter) for name, made in shown.items()},
    }
    metrics["sides"][f"teacher_{sampler.steps}"]["network_calls"] = sampler.network_calls
    if probe:
        _of_probe(metrics, shown, side, stage.prompt, probe, adapter)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    columns = page.columns(count, next(iter(shown.values())).shape[-1])
    about = {
        "teacher": teacher.fingerprint,
        "sampler": sampler.model_dump(mode="json"),
        "seed": seed,
        "samples": columns,
        "prompts": [stage.prompt] * len(columns),
    }
    strips = {name: made[columns].numpy() for name, made in shown.items()}
    page.write(output, metrics, strips, about, particles.folder / PREVIEWS)
    return {**metrics, "device": adapter.device_name}


def _as_the_teachers(made: Tensor, teacher: Adapter) -> Tensor:
    """Scale images (N, 3, H, W) to the size of the teacher's."""
    size = [side * teacher.down_sampling for side in teacher.latent_shape[1:]]
    if list(made.shape[2:]) == size:
        return made
    return functional.interpolate(made, size, mode="bilinear", antialias=True).clamp(-1, 1)


def _figures(made: Tensor, sides: np.ndarray, teacher: Adapter) -> dict[str, Any]:
    """Return the figures of images (N, 3, H, W) that need no probe. sides: (N,)."""
    pixels = made.numpy()
    figures: dict[str, Any] = {}
    for name, values in (("saturation", images.saturation(pixels)), ("contrast", images.contrast(pixels))):
        figures |= _mean(name, values)
    distance = images.distance(pixels, sides)
    if distance is not None:
        figures["image_distance"] = distance
    if isinstance(teacher, Exact):
        latents = torch.cat([teacher.encode(part) for part in made.split(SEEN_AT_ONCE)])
        figures |= _mean("nearest_mse", teacher.nearest(latents).cpu().numpy())
    return figures


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    error = {f"{name}_se": float(values.std(ddof=1) / len(values) ** 0.5)} if len(values) > 1 else {}
    return {name: float(values.mean()), **error}


def _of_probe(
    metrics: dict[str, Any],
    shown: dict[str, Tensor],
    sides: np.ndarray,
    prompt: str,
    probe: Artifact,
    teacher: Adapter,
) -> None:
    """Add the prompt accuracy and the diversity in the probe's features to all sides of `metrics`."""
    assert isinstance(probe.stage, Probe)
    classifier = Classifier.load(probe.folder, teacher.device)
    metrics["features"] = f"{probe.stage.images.name}_probe_{classifier.features}"
    metrics["probe_accuracy"] = probe.record["metrics"]["caption_accuracy"]
    for name, made in shown.items():
        features, predicted = classifier.look(made.split(SEEN_AT_ONCE))
        figures = metrics["sides"][name]
        if isinstance(probe.stage.images, Digits) and prompt:
            right = accuracy(predicted, digits.prompt_labels([prompt] * len(made)))
            figures |= {"prompt_accuracy": right, "prompt_accuracy_se": (right * (1 - right) / len(made)) ** 0.5}
        diversity = distances.diversity(features, [str(side) for side in sides])
        if diversity is not None:
            figures["diversity"] = diversity
