"""Trains and tests a perceptual network, or tests an imported one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.base import SCRATCH, Progress, StageError
from stages.data.latents import count_classes
from stages.data.order import ShuffledOrder
from stages.losses.regression import mse
from stages.networks import perceptual
from stages.networks.compute import device_name, device_of, prepare
from stages.networks.perceptual import LPIPS, About
from stages.networks.vgg import VGG, Classifier
from stages.perceptual.calibration import CalibrationTraining, Heads
from stages.perceptual.classification import ClassificationTraining, top_1
from stages.perceptual.config import Recipe
from stages.perceptual.judgement import Metrics, judged
from stages.perceptual.seen import Seen, SeenTriplets
from stages.perceptual.source import Source
from stages.training import TrainingExecution
from stages.training.loop import Trained, train

log = logging.getLogger(__name__)

FEW = 1024
"""Number of samples from which the standard deviation of the inputs is estimated."""


def train_perceptual(
    recipe: Recipe, execution: TrainingExecution, seed: int, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Train a network, test it, and write both to `output`. Return its figures. Raises StageError."""
    assert recipe.latents
    prepare(threads)
    scratch, device = output / SCRATCH, torch.device(device_of(execution))
    source = Source(recipe, execution, scratch)
    judgements, tests = source.triplets(False), source.triplets(True)  # early, to report their problems at once
    training = source.seen(False)
    channels, *size = training.x(slice(0, 1)).shape[1:]
    torch.manual_seed(seed)
    trunk = VGG(channels, recipe.width, recipe.space)
    untrained, trained, figures = copy.deepcopy(trunk).eval(), None, {}
    if recipe.classification:
        classes = count_classes(recipe.latents.folder)
        classifier = Classifier(trunk, classes, (size[0], size[1]), recipe.classification.dropout)
        trained = yield from _classify(classifier, training, recipe, execution, seed, scratch)
        best = trained.averages["classifier"]
        assert isinstance(best, Classifier)
        found = top_1(best, source.seen(True).batches())
        figures = {"top_1": float(np.mean(list(found.values()))), "top_1_by_label": found}
        trunk = best.trunk.cpu()
    else:
        log.warning("there is no `classification`, so the weights of the trunk stay random")
    some = np.linspace(0, training.count - 1, FEW).astype(np.int64)  # files are often sorted by class
    about = About(
        space=recipe.space,
        channels=channels,
        width=recipe.width,
        trunk="trained" if recipe.classification else "random",
        images=source.images.name,
        std=float(training.x(some).std()),
    )
    known = yield from source.encoded(judgements, "triplets")
    heads, calibrated = yield from calibrate(trunk, about, known, recipe, execution, seed + 1, scratch)
    perceptual.write(output, trunk, heads, about)
    histories = {"classification": trained, "calibration": calibrated}
    lines = [{"phase": name, **line} for name, phase in histories.items() if phase for line in phase.history]
    (output / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    unseen = yield from source.encoded(tests, "test triplets")
    metrics: Metrics = {about.name: LPIPS(trunk, heads, about).to(device), "mse": mse}
    if trained:
        metrics["untrained"] = LPIPS(untrained, heads, about).to(device)
    return {**asdict(about), **figures, **_judged(output, metrics, unseen, device), "device": calibrated.device}


def adopt_perceptual(
    folder: Path, recipe: Recipe, execution: TrainingExecution, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Copy the network of `folder` to `output`, and test it if the recipe has triplets. Return its figures. Raises
    StageError."""
    prepare(threads)
    device = torch.device(device_of(execution))
    trunk, heads, about = perceptual.read(folder)
    if about.space != recipe.space:
        raise StageError(f"from: the network in {folder} compares {about.space}, not {recipe.space}")
    perceptual.write(output, trunk, heads, about)
    figures: dict[str, Any] = {**asdict(about), "device": device_name(device.type)}
    if recipe.triplets:
        source = Source(recipe, execution, output / SCRATCH)
        tests = yield from source.encoded(source.triplets(True), "test triplets")
        figures |= _judged(output, {about.name: LPIPS(trunk, heads, about).to(device), "mse": mse}, tests, device)
    return figures


def _classify(
    classifier: Classifier, training: Seen, recipe: Recipe, execution: TrainingExecution, seed: int, scratch: Path
) -> Generator[Progress, None, Trained]:
    assert recipe.classification
    settings = recipe.classification.training
    order = ShuffledOrder(training.count, settings.batch_size, seed)

    def batch(step: int) -> dict[str, Any]:
        x, labels = training.batch(order.batch(step))
        return {"x": x, "labels": labels}

    return (
        yield from train(
            ClassificationTraining(classifier, settings, recipe.classification.mirror),
            batch,
            seed=seed,
            checkpoints=scratch / "classification",
            execution=execution,
            unit="classification steps",
        )
    )


def calibrate(
    trunk: VGG,
    about: About,
    known: SeenTriplets,
    recipe: Recipe,
    execution: TrainingExecution,
    seed: int,
    scratch: Path,
) -> Generator[Progress, None, tuple[list[torch.Tensor], Trained]]:
    """Train the heads. Return the weights of each tap, (C_k,), and the record of the training."""
    assert recipe.calibration
    settings = recipe.calibration.training
    torch.manual_seed(seed)
    heads = Heads(trunk.tap_channels)
    metric = LPIPS(trunk, list(heads.weights), about).to(device_of(execution))
    order = ShuffledOrder(len(known.votes), settings.batch_size, seed)

    def batch(step: int) -> dict[str, Any]:
        index = order.batch(step)
        return {**known.batch(index), "votes": torch.from_numpy(known.votes[index])}

    trained = yield from train(
        CalibrationTraining(metric, heads, settings, recipe.calibration.dropout),
        batch,
        seed=seed,
        checkpoints=scratch / "calibration",
        execution=execution,
        unit="calibration steps",
    )
    fitted = trained.averages["heads"].cpu()
    assert isinstance(fitted, Heads)
    return [weight.detach().flatten() for weight in fitted.weights], trained


def _judged(output: Path, metrics: Metrics, tests: SeenTriplets, device: torch.device) -> dict[str, Any]:
    found = judged(metrics, tests, device)
    (output / "two_afc.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    first = next(iter(metrics))
    return {"two_afc": {category: entry["metrics"][first]["score"] for category, entry in found.items()}}
