"""A perceptual network trained and tested, or taken from elsewhere and tested."""

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
from stages.data.images.labelled import LabelledImages
from stages.data.images.load import load
from stages.data.images.sealed import images_of
from stages.data.latents import count_classes, read_latents
from stages.data.order import ShuffledOrder
from stages.latents import Latents
from stages.methods.base import TrainingExecution
from stages.networks import perceptual
from stages.networks.compute import device_name, device_of, prepare
from stages.networks.perceptual import LPIPS, About
from stages.networks.teachers import load_network
from stages.networks.vgg import VGG, Classifier
from stages.perception import seen
from stages.perception.calibration import CalibrationTraining, Heads
from stages.perception.classification import ClassificationTraining, batches_of, top_1
from stages.perception.config import Recipe
from stages.perception.judgement import MSE, judged
from stages.perception.seen import Encode, Seen, SeenTriplets
from stages.training import train

log = logging.getLogger(__name__)

FEW = 1024
"""Samples that the standard deviation of what is trained on is measured on."""


def train_perceptual(
    recipe: Recipe, execution: TrainingExecution, seed: int, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output` with a trained network and its test; return its figures. Raises StageError."""
    assert recipe.calibration and recipe.latents and isinstance(recipe.latents.stage, Latents)
    prepare(threads)
    torch.manual_seed(seed)
    scratch, device = output / SCRATCH, torch.device(device_of(execution))
    training, unseen = (_seen(recipe, held_out, scratch) for held_out in (False, True))
    channels, *size = training.x(slice(0, 1)).shape[1:]
    trunk = VGG(channels, recipe.width, recipe.space)
    figures: dict[str, Any] = {}
    untrained = copy.deepcopy(trunk).eval()
    if recipe.classification:
        trunk, figures = yield from _classify(
            recipe, execution, trunk, (size[0], size[1]), training, unseen, seed, scratch
        )
    else:
        log.warning("there is no `classification`: the trunk stays random")
    about = About(
        space=recipe.space,
        channels=channels,
        width=recipe.width,
        trunk=f"trained on {recipe.latents.stage.images.name}" if recipe.classification else "random",
        std=float(training.x(slice(0, FEW)).std()),
    )

    encode = _encode(recipe, execution)
    judgements = yield from _triplets(recipe, encode, False, scratch)
    heads = Heads(trunk.tap_channels)
    metric = LPIPS(trunk, [weight for weight in heads.weights], about).to(device)
    order = ShuffledOrder(len(judgements.votes), recipe.calibration.training.batch_size, seed + 1)
    calibrated = yield from train(
        CalibrationTraining(metric, heads, recipe.calibration.training, recipe.calibration.dropout),
        lambda step: {
            **judgements.batch(index := order.batch(step)),
            "votes": torch.from_numpy(judgements.votes[index]),
        },
        seed=seed + 1,
        checkpoints=scratch / "calibration",
        execution=execution,
        unit="calibration steps",
    )
    fitted = calibrated.averages["heads"].cpu()
    assert isinstance(fitted, Heads)
    weights = [weight.detach().flatten() for weight in fitted.weights]
    perceptual.write(output, trunk.cpu(), weights, about)

    tests = yield from _triplets(recipe, encode, True, scratch)
    candidates = {"lpips": LPIPS(trunk, weights, about), "mse": MSE(), "untrained": LPIPS(untrained, weights, about)}
    return (
        figures
        | _judged(output, {n: m.to(device) for n, m in candidates.items()}, tests)
        | {"device": calibrated.device}
    )


def adopt_perceptual(
    source: Path, recipe: Recipe, execution: TrainingExecution, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output` with the network of `recipe.from_`, tested where there are triplets. Raises StageError."""
    prepare(threads)
    device = torch.device(device_of(execution))
    trunk, heads, about = perceptual.read(source)
    if about.space != recipe.space:
        raise StageError(f"from: the network in {source} looks at {about.space}, not at {recipe.space}")
    perceptual.write(output, trunk, heads, about)
    figures: dict[str, Any] = {**asdict(about), "device": device_name(device.type)}
    if recipe.triplets:
        tests = yield from _triplets(recipe, _encode(recipe, execution), True, output / SCRATCH)
        metrics = {"lpips": LPIPS(trunk, heads, about).to(device), "mse": MSE()}
        figures |= _judged(output, metrics, tests)
    return figures


def _classify(
    recipe: Recipe,
    execution: TrainingExecution,
    trunk: VGG,
    size: tuple[int, int],
    training: Seen,
    unseen: Seen,
    seed: int,
    scratch: Path,
) -> Generator[Progress, None, tuple[VGG, dict[str, Any]]]:
    assert recipe.classification and recipe.latents
    settings = recipe.classification.training
    classes = count_classes(recipe.latents.folder)
    classifier = Classifier(trunk, classes, size, recipe.classification.dropout)
    order = ShuffledOrder(training.count, settings.batch_size, seed)

    def batch(step: int) -> dict[str, Any]:
        x, labels = training.batch(order.batch(step))
        return {"x": x, "labels": labels}

    trained = yield from train(
        ClassificationTraining(classifier, settings, recipe.classification.mirror),
        batch,
        seed=seed,
        checkpoints=scratch / "classification",
        execution=execution,
        unit="classification steps",
    )
    best = trained.averages["classifier"]
    assert isinstance(best, Classifier)
    found = top_1(best, batches_of(unseen.count, unseen.x, unseen.labels))
    mean = float(np.mean(list(found.values())))
    log.info("top-1 accuracy on held-out images: %.4f", mean)
    return best.trunk.cpu(), {"top_1": mean, "top_1_by_label": found}


def _seen(recipe: Recipe, held_out: bool, scratch: Path) -> Seen:
    """The labelled images of a `latents` artifact, as the network sees them."""
    assert recipe.latents
    if recipe.space == "latents":
        encoded = read_latents(recipe.latents.folder, held_out)
        labels = {name: torch.from_numpy(values) for name, values in encoded.labels.items()}
        return Seen(lambda index: torch.from_numpy(encoded.batch(index)), labels, len(encoded))
    images = _images(recipe, held_out, scratch)
    labels = {name: torch.from_numpy(values) for name, values in images.labels.items()}
    return Seen(lambda index: torch.from_numpy(images.pixels(index)), labels, len(images))


def _images(recipe: Recipe, held_out: bool, scratch: Path) -> LabelledImages:
    assert recipe.latents
    return load(images_of(recipe.latents), held_out=held_out, scratch=scratch)


def _encode(recipe: Recipe, execution: TrainingExecution) -> Encode:
    if recipe.space == "pixels":
        return lambda images: images
    assert recipe.latents
    return load_network(recipe.latents.inputs["teacher"].folder, execution).encode


def _triplets(recipe: Recipe, encode: Encode, held_out: bool, scratch: Path) -> Generator[Progress, None, SeenTriplets]:
    assert recipe.triplets
    found = recipe.triplets.load(lambda held: _images(recipe, held, scratch), held_out)
    folder = scratch / ("test_triplets" if held_out else "triplets")
    for done in seen.encoded(found, encode, folder):
        yield Progress(done, len(found.votes), "triplets encoded")
    return seen.read(found, folder)


def _judged(output: Path, metrics: dict[str, Any], tests: SeenTriplets) -> dict[str, Any]:
    device = next(metrics["lpips"].parameters()).device
    found = judged(metrics, tests, device)
    (output / "two_afc.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return {"two_afc": {category: entry["metrics"]["lpips"]["score"] for category, entry in found.items()}}
