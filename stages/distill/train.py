"""Trains and exports a student. Runs on a worker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.base import SCRATCH, Artifact, Progress, StageError
from stages.data.supply import LatentSupply, PairSupply, Supply
from stages.diffusion.form import Form
from stages.distill.card import card
from stages.distill.recipe import Recipe
from stages.methods.base import Materials
from stages.networks.compute import prepare
from stages.networks.network import NetworkTeacher
from stages.networks.student import Student, export
from stages.networks.teachers import load_network
from stages.pairs import Pairs, guidance_scales
from stages.training import Batch, TrainingExecution
from stages.training.loop import step_seed, train

BATCH = 16
EXAMPLES = 512
"""Pairs to which a student's last layer is fitted before training; a choice of Retort's."""


def distill(
    recipe: Recipe, execution: TrainingExecution, seed: int, output: Path, threads: int, fingerprint: str
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output` with the student's folder; return its figures. Raises StageError if it cannot be trained."""
    prepare(threads)
    if recipe.generation:  # each link of a chain draws images and noises of its own
        seed = step_seed(seed, recipe.generation)
    torch.manual_seed(seed)
    teacher = load_network(recipe.teacher.folder, execution)
    for path, problem in recipe.method.check_prediction(teacher.prediction, recipe.start is None):
        raise StageError(f"method.{path}: {problem}")
    scales = guidance_scales(recipe.method.form, recipe.pairs)
    supply = _supply(recipe, teacher, seed)
    method = recipe.method.create(
        Materials(
            teacher,
            recipe.training,
            recipe.start,
            (scales or [1.0])[0],
            recipe.inputs,
            recipe.contents,
            _examples(supply, teacher) if isinstance(supply, PairSupply) else None,
        )
    )

    def batch(step: int) -> Batch:
        return _tensors(supply.batch(step))

    trained = yield from train(method, batch, seed=seed, checkpoints=output / SCRATCH, execution=execution)
    student = trained.averages["student"]
    assert isinstance(student, Student)
    if scales:
        student.form = student.form.model_copy(update={"guidance_scale": scales[0]})
    figures = {"training_loss": trained.losses["student"], "device": trained.device}
    if isinstance(supply, PairSupply):
        figures |= _on_held_out(student, teacher, supply, recipe.pairs[0])
    export(student, teacher, output, card(recipe, student.form, teacher, supply.count, figures, fingerprint))
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return figures


def _supply(recipe: Recipe, teacher: NetworkTeacher, seed: int) -> Supply:
    """Raises StageError for latents of another size than the teacher's: the student's would be."""
    size = recipe.training.batch_size
    if recipe.latents is None:
        return PairSupply([one.folder for one in recipe.pairs], recipe.weights, recipe.held_out, size, seed)
    supply = LatentSupply(recipe.latents.folder, teacher.prompts_of, size, seed)
    if supply.shape != teacher.latent_shape:
        raise StageError(
            f"the latents are {supply.shape}, but the teacher makes {teacher.latent_shape}, and so will its student; "
            f"encode images of {teacher.latent_shape[1] * teacher.down_sampling} pixels"
        )
    return supply


def _tensors(stored: Mapping[str, Any]) -> Batch:
    return {name: v if name == "prompts" else torch.from_numpy(v).float() for name, v in stored.items()}


def _examples(supply: PairSupply, teacher: NetworkTeacher) -> Callable[[], Batch]:
    def examples() -> Batch:
        found = _tensors(supply.examples(EXAMPLES))
        return {name: v.to(teacher.device) if isinstance(v, Tensor) else v for name, v in found.items()}

    return examples


def _on_held_out(student: Student, teacher: NetworkTeacher, supply: PairSupply, pairs: Artifact) -> dict[str, float]:
    """Its error on the pairs held out, if it is to make what they hold. Raises StageError if that is not finite."""
    assert isinstance(pairs.stage, Pairs)
    w = _comparable(student.form, pairs.stage.sampler.guidance_scale)
    if w is None:
        return {}
    error = _error(student, teacher, supply, w)
    if not math.isfinite(error):
        raise StageError(f"the student's error on held-out pairs is {error}; lower training.learning_rate")
    return {"held_out_mse": error}


def _comparable(form: Form, guidance_scale: float) -> float | None:
    """The w at which the student is to make what pairs of a `guidance_scale` hold; None if it is not, or adds noise of
    its own."""
    if form.steps > 1 and form.sampler != "ddim":
        return None
    w = guidance_scale - 1
    if form.w_range:
        least, most = form.w_range
        return w if least <= w <= most else None
    return w if form.guidance_scale == guidance_scale else None


@torch.no_grad()
def _error(student: Student, teacher: NetworkTeacher, pairs: PairSupply, w: float) -> float:
    """Mean squared error to the stored latents of the pairs held out, over all elements."""
    errors: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(pairs.held), BATCH):
        held = pairs.reader.batch(pairs.held[start : start + BATCH])
        noise = teacher.to_device(held.noise)
        x0 = student(noise, teacher.encode_prompts(held.prompts), noise.new_full((len(noise),), w), generator)
        errors.append((x0 - teacher.to_device(held.latent)).square().mean((1, 2, 3)))
    return float(torch.cat(errors).mean())
