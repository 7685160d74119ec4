"""What `kind: distill` does: train a method's student, try it on the pairs held out, export it."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.base import SCRATCH, Artifact, Progress, StageError
from stages.data.supply import LatentSupply, PairSupply, Supply
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.losses.config import LossConfig
from stages.methods.base import Batch, Materials, MethodConfig, TrainingExecution, TrainingSettings
from stages.networks.compute import prepare
from stages.networks.exporting import scheduler_of, why_not_plain
from stages.networks.network import NetworkTeacher
from stages.networks.perceptual import about_of
from stages.networks.student import Student, export
from stages.networks.teachers import load_network
from stages.pairs import Pairs, guidance_scales
from stages.training import train

BATCH = 16


def distill(
    method_config: MethodConfig,
    training: TrainingSettings,
    held_out: int,
    execution: TrainingExecution,
    sources: list[Artifact],
    weights: list[float | None],
    latents: Artifact | None,
    inputs: Mapping[str, Artifact],
    contents: Mapping[str, str],
    start: Artifact | None,
    seed: int,
    output: Path,
    threads: int,
    fingerprint: str,
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output` with the student's folder; return its figures. Raises StageError if it cannot be trained."""
    prepare(threads)
    torch.manual_seed(seed)
    origin = latents or sources[0]
    teacher = load_network(origin.inputs["teacher"].folder, execution)
    scales = guidance_scales(method_config.form, sources)
    method = method_config.create(Materials(teacher, training, start, (scales or [1.0])[0], inputs, contents))
    supply: Supply
    if latents:
        supply = LatentSupply(latents.folder, teacher, training.batch_size, seed)
    else:
        folders = [source.folder for source in sources]
        supply = PairSupply(folders, weights, held_out, training.batch_size, seed)

    def batch(step: int) -> Batch:
        stored = supply.batch(step)
        return {name: v if name == "prompts" else torch.from_numpy(v).float() for name, v in stored.items()}

    trained = yield from train(method, batch, seed=seed, checkpoints=output / SCRATCH, execution=execution)
    student = trained.averages["student"]
    assert isinstance(student, Student)
    if len(scales) == 1:
        student.form = student.form.model_copy(update={"guidance_scale": scales[0]})
    figures = {"training_loss": trained.losses["student"], "device": trained.device}
    if isinstance(supply, PairSupply) and isinstance(origin.stage, Pairs):
        w = _comparable(method_config, origin.stage)
        if w is not None:
            error = _error(student, teacher, supply, w)
            if not math.isfinite(error):
                raise StageError(f"the student's error on held-out pairs is {error}; lower training.learning_rate")
            figures["held_out_mse"] = error
    card = _card(
        method_config,
        student.form,
        training,
        supply,
        [latents] if latents else sources,
        inputs,
        start,
        figures,
        fingerprint,
        teacher,
    )
    export(student, teacher, output, card)
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return figures


def _comparable(method: MethodConfig, pairs: Pairs) -> float | None:
    """The w at which the student is to make what the pairs hold; None if it is not, or adds noise of its own."""
    if method.form.steps > 1 and method.form.sampler != "ddim":
        return None
    w = pairs.sampler.guidance_scale - 1
    if method.form.w_range:
        least, most = method.form.w_range
        return w if least <= w <= most else None
    return w if method.form.guidance_scale in (None, pairs.sampler.guidance_scale) else None


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


def _card(
    method: MethodConfig,
    form: Form,
    training: TrainingSettings,
    supply: Supply,
    data: list[Artifact],
    inputs: Mapping[str, Artifact],
    start: Artifact | None,
    figures: Mapping[str, Any],
    fingerprint: str,
    teacher: NetworkTeacher,
) -> str:
    """The model card: how it was made, from what, how good, and the exact call."""
    artifact = data[0].inputs["teacher"]
    source = artifact.record.get("metrics", {})
    origin = source.get("source") or "trained by Retort"
    at = f" at {source['revision']}" if source.get("revision") else ""
    names = ", ".join(f"{one.kind}/{one.fingerprint}" for one in data)
    begun = f"It went on from distill/{start.fingerprint}." if start else "It began with the teacher's weights."
    count = {1: "One", 2: "Two", 4: "Four", 8: "Eight"}.get(form.steps, str(form.steps))
    return f"""---
library_name: diffusers
license: {source.get("licence") or ("apache-2.0" if origin.startswith("trained") else "unknown")}
---
# {count}-step student

Distilled by Retort (distill/{fingerprint}) with `{_method_and_loss(method)}`, {training.steps} steps of
{training.batch_size}, from {supply.count} {data[0].kind} ({names}) of a teacher
({origin}{at}; teacher/{artifact.fingerprint}; licence: {source.get("licence") or "not stated"}){_solved(data[0])}.
{begun} {_guidance(form)}

{_looked_through(inputs)}{_quality(supply, figures)}{_call(form, teacher)}
"""


def _quality(supply: Supply, figures: Mapping[str, Any]) -> str:
    if not isinstance(supply, PairSupply) or "held_out_mse" not in figures:
        return ""
    error = figures["held_out_mse"]
    return f"Mean squared error to the teacher's latents on {len(supply.held)} held-out pairs: {error:.4f}.\n\n"


def _call(form: Form, teacher: NetworkTeacher) -> str:
    """How plain diffusers draws with it, or why it does not."""
    grid = Grid.of(form.schedule, teacher.schedule, form.steps)
    scheduler = scheduler_of(form, grid, teacher.folder)
    alone = why_not_plain(form, grid, scheduler)
    if alone:
        return f"Not for plain diffusers: {alone}. `retort sample` draws with it."
    return f"```python\n{teacher.usage(form, type(scheduler).__name__)}\n```"


def _solved(data: Artifact) -> str:
    if not isinstance(data.stage, Pairs):
        return ""
    sampler = data.stage.sampler
    return f" solved by\n{sampler.name.upper()} in {sampler.steps} steps at guidance {sampler.guidance_scale}"


def _guidance(form: Form) -> str:
    if form.w_range:
        least, most = (1 + w for w in form.w_range)
        return f"It takes any guidance_scale from {least:g} to {most:g}, without calling its network twice."
    scale = form.guidance_scale
    return "The guidance of its pairs is built in." if scale is None else f"Guidance {scale:g} is built in."


def _method_and_loss(method: MethodConfig) -> str:
    loss = getattr(method, "loss", None)
    return f"{method.name}, loss {loss.name}" if isinstance(loss, LossConfig) else method.name


def _looked_through(inputs: Mapping[str, Artifact]) -> str:
    """A sentence for each network of others' making that the loss looked through, and its licence."""
    lines = ""
    for network in (artifact for artifact in inputs.values() if artifact.kind == "perceptual"):
        about = about_of(network.folder)
        through = f"perceptual/{network.fingerprint} ({about.trunk}; licence: {about.licence})"
        lines += f"The loss looked through {through}.\n\n"
    return lines
