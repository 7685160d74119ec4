"""Training and export of a student, on a worker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.base import SCRATCH, Artifact, Progress, StageError
from stages.data.files import files_of, sha256_of
from stages.data.supply import LatentSupply, PairSupply, PromptSupply, Supply
from stages.distill.card import card
from stages.distill.held_out import comparable, mean_square, sampled
from stages.distill.recipe import Recipe
from stages.methods.base import Materials, Stream, prompts_of
from stages.networks.adapter import Adapter, read_json
from stages.networks.adapters import adapter_of, family_of
from stages.networks.compute import prepare
from stages.networks.student import Student, export
from stages.networks.teachers import load_network
from stages.pairs import Pairs, guidance_scales, stored_scale
from stages.training import Batch, StudentExecution, TrainingExecution
from stages.training.loop import step_seed, train
from stages.training.preview import COLUMNS, Averages, Previews

SAVED_BY = ("transformers_version", "torch_dtype", "dtype")
"""Settings of a component's config that do not change what it computes."""
EXAMPLES = 512
"""The number of pairs to which the student's last layer may be fitted before training."""
MOST_CALLS = 16
"""Students of more steps draw no previews during training, because that would take long."""


def distill(
    recipe: Recipe, execution: StudentExecution, seed: int, output: Path, threads: int, fingerprint: str
) -> Generator[Progress, None, dict[str, Any]]:
    """Train the student and export it to `output`. Returns its figures.

    `output` also gets history.jsonl, a line for each logged step, the previews and the checkpoints. Raises StageError
    if the student cannot be trained."""
    prepare(threads)
    if recipe.generation:  # each link of a chain draws different images and noises
        seed = step_seed(seed, recipe.generation)
    torch.manual_seed(seed)
    teacher = load_network(recipe.teacher.folder, execution)
    origin = _origin(recipe.origin.folder, teacher, execution) if recipe.origin else teacher
    for path, problem in recipe.method.check_prediction(origin.prediction, recipe.start is None):
        raise StageError(f"method.{path}: {problem}")
    lora = recipe.training.lora_error(recipe.method.form, origin.prediction)
    if lora:
        raise StageError(f"training.lora: {lora}")
    scales = guidance_scales(recipe.method.form, recipe.pairs)
    supplies = {
        stream: _supply(stream, recipe, teacher, step_seed(seed, place) if place else seed)
        for place, stream in enumerate(recipe.streams)
    }
    pairs = supplies.get("pairs")
    method = recipe.method.create(
        Materials(
            teacher,
            recipe.training,
            recipe.start,
            (scales or [1.0])[0],
            recipe.inputs,
            recipe.contents,
            _examples(pairs, teacher) if isinstance(pairs, PairSupply) else None,
            origin,
            seed,
        )
    )

    def batch(step: int) -> Batch:
        return {stream: _tensors(supply.batch(step)) for stream, supply in supplies.items()}

    first = islice((prompt for step in range(COLUMNS) for prompt in prompts_of(batch(step))), COLUMNS)
    previews = _previews(output, teacher, list(first), recipe, execution)
    trained = yield from train(
        method, batch, seed=seed, checkpoints=output / SCRATCH, execution=execution, watch=previews
    )
    previews.draw()
    student = trained.averages["student"]
    assert isinstance(student, Student)
    if scales and not student.form.w_range:
        student.form = student.form.model_copy(update={"guidance_scale": scales[0]})
    figures = {"training_loss": trained.losses["student"], "device": trained.device}
    if isinstance(pairs, PairSupply) and pairs.held:
        figures |= _on_held_out(student, teacher, pairs, recipe.pairs[0])
    counts = {stream: supply.count for stream, supply in supplies.items()}
    export(student, output, card(recipe, student.form, teacher, counts, figures, fingerprint))
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return figures


def _supply(stream: Stream, recipe: Recipe, teacher: Adapter, seed: int) -> Supply:
    """Create the supply of a data stream. Raises StageError if latents have another shape than the teacher's."""
    size = recipe.training.batch_size
    if stream == "pairs":
        folders, scale = [one.folder for one in recipe.pairs], stored_scale(recipe.pairs)
        return PairSupply(folders, recipe.weights, recipe.held_out, size, seed, scale)
    if stream == "prompts":
        return PromptSupply(recipe.prompts, size, seed)
    assert recipe.latents
    supply = LatentSupply(recipe.latents.folder, teacher.prompts_of, size, seed)
    if supply.shape != teacher.latent_shape:
        raise StageError(
            f"the latents have the shape {supply.shape}, the teacher's have {teacher.latent_shape}; "
            f"encode images of {teacher.latent_shape[1] * teacher.down_sampling} pixels"
        )
    return supply


def _previews(
    output: Path, teacher: Adapter, prompts: list[str], recipe: Recipe, execution: StudentExecution
) -> Previews:
    """Return the previews of the averaged student, from fixed noises and `prompts`, one for each."""
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))

    def images(averages: Averages) -> NDArray[np.float32]:
        student = averages["student"]
        assert isinstance(student, Student)
        z = noise.to(teacher.device)
        w = z.new_full((len(z),), sum(student.form.w_range) / 2 if student.form.w_range else 0.0)
        x0 = student(z, student.encode(prompts), w, torch.Generator().manual_seed(0))
        return teacher.decode(x0).numpy()

    count = execution.previews if recipe.method.form.steps <= MOST_CALLS else 0
    return Previews(output, prompts, recipe.training.steps, count, images)


def _origin(folder: Path, teacher: Adapter, execution: TrainingExecution) -> Adapter:
    """Load the pipeline in `folder`, whose network the student starts from.

    Raises StageError unless its family, noise schedule, latent shape and other components are those of the teacher."""
    if family_of(type(teacher)) is not family_of(adapter_of(folder)):
        raise StageError("start: its pipeline is of another family than the teacher's")
    for name in set(teacher.COMPONENTS) - {teacher.NETWORK, "scheduler"}:
        patterns = [pattern for pattern in teacher.FILES if pattern.startswith(f"{name}/")]
        if _identity(folder, patterns) != _identity(teacher.folder, patterns):
            raise StageError(f"start: its {name} differs from the teacher's; the two must be equal")
    origin = load_network(folder, execution)
    wanted, found = teacher.schedule.log_snr, origin.schedule.log_snr
    if len(wanted) != len(found) or not np.allclose(wanted, found):
        raise StageError("start: its noise schedule differs from the teacher's; the two must be equal")
    if origin.latent_shape != teacher.latent_shape:
        raise StageError(
            f"start: its latents have the shape {origin.latent_shape}, the teacher's have {teacher.latent_shape}"
        )
    return origin


def _identity(folder: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Return what a component computes: file name -> its sha256, or the settings in its config.json.

    Settings that only record how the config was saved are left out."""

    def settings(path: Path) -> dict[str, Any]:
        return {
            name: value for name, value in read_json(path).items() if not name.startswith("_") and name not in SAVED_BY
        }

    return {
        name: settings(path) if path.name == "config.json" else sha256_of(path)
        for name, path in files_of(str(folder), patterns).items()
    }


def _tensors(stored: Mapping[str, Any]) -> Batch:
    """Convert arrays to float32 tensors on the CPU. `prompts` are kept as they are."""
    return {name: v if name == "prompts" else torch.from_numpy(v).float() for name, v in stored.items()}


def _examples(supply: PairSupply, teacher: Adapter) -> Callable[[], Batch]:
    """Return a function that reads EXAMPLES training pairs, or all if there are fewer, to the teacher's device."""

    def examples() -> Batch:
        found = _tensors(supply.examples(EXAMPLES))
        return {name: v.to(teacher.device) if isinstance(v, Tensor) else v for name, v in found.items()}

    return examples


def _on_held_out(student: Student, teacher: Adapter, supply: PairSupply, pairs: Artifact) -> dict[str, float]:
    """Return the student's mean squared error on held-out pairs as a figure. The result is empty if the
    student is not `comparable` with them. Raises StageError if the error is not finite."""
    assert isinstance(pairs.stage, Pairs)
    if not comparable(student.form, pairs.stage.sampler.guidance_scale):
        return {}
    error = mean_square(x0 - latent for x0, latent in sampled(student, teacher, supply))
    if not math.isfinite(error):
        raise StageError(f"the student's error on held-out pairs is {error}; lower training.learning_rate")
    return {"held_out_mse": error}
