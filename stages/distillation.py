"""What `kind: distill` does: train a method's student on pairs, try it on those held out, export it."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from stages.base import SCRATCH, Artifact, Progress, StageError
from stages.data.order import ShuffledOrder
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.diffusion.samplers import timesteps
from stages.losses.config import LossConfig
from stages.methods.base import Batch, Materials, MethodConfig, TrainingExecution, TrainingSettings
from stages.networks.compute import prepare
from stages.networks.network import NetworkTeacher
from stages.networks.perceptual import about_of
from stages.networks.student import OneStepStudent, export
from stages.networks.teachers import load_network
from stages.pairs import Pairs
from stages.training import train

BATCH = 16


def distill(
    method_config: MethodConfig,
    training: TrainingSettings,
    held_out: int,
    execution: TrainingExecution,
    sources: list[Artifact],
    weights: list[float | None],
    inputs: Mapping[str, Artifact],
    contents: Mapping[str, str],
    start: Artifact | None,
    seed: int,
    output: Path,
    threads: int,
    fingerprint: str,
) -> Generator[Progress, None, dict[str, Any]]:
    """Fill `output` with the student's folder; return its figures. Raises StageError if it cannot be trained."""
    pairs = sources[0]
    assert isinstance(pairs.stage, Pairs)
    prepare(threads)
    torch.manual_seed(seed)
    teacher = load_network(pairs.inputs["teacher"].folder, execution)
    sampler = pairs.stage.sampler
    grid = timesteps(len(teacher.schedule), sampler.steps, sampler.timestep_spacing)
    method = method_config.create(Materials(teacher, grid, training, start, inputs, contents))
    lists = [read_list(source.folder) for source in sources]
    reader = PairReader([shard for shards in lists for shard in shards])
    ends = list(accumulate(sum(shard.count for shard in shards) for shards in lists))
    held = range(ends[0] - held_out, ends[0])
    ranges = [range(held.start), *(range(*ends[i : i + 2]) for i in range(len(ends) - 1))]
    shares = [len(drawn) if weight is None else weight for drawn, weight in zip(ranges, weights, strict=True)]
    try:
        order = ShuffledOrder(ranges, training.batch_size, seed, weights=shares)
    except ValueError as error:
        raise StageError(f"pairs: {error}") from None

    def batch(step: int) -> Batch:
        drawn = reader.batch(order.batch(step))
        return {
            "noise": torch.from_numpy(drawn.noise).float(),
            "latent": torch.from_numpy(drawn.latent).float(),
            "prompts": drawn.prompts,
        }

    trained = yield from train(method, batch, seed=seed, checkpoints=output / SCRATCH, execution=execution)
    student = trained.averages["student"]
    assert isinstance(student, OneStepStudent)
    held_out_mse = _error(student, teacher, reader, held)
    if not math.isfinite(held_out_mse):
        raise StageError(f"the student's error on held-out pairs is {held_out_mse}; lower training.learning_rate")
    figures = {
        "held_out_mse": held_out_mse,
        "training_loss": trained.losses["student"],
        "device": trained.device,
    }
    export(
        student,
        teacher,
        output,
        _card(method_config, training, held_out, sources, inputs, start, held_out_mse, fingerprint, teacher.usage()),
    )
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return figures


@torch.no_grad()
def _error(student: OneStepStudent, teacher: NetworkTeacher, reader: PairReader, indices: range) -> float:
    """Mean squared error to the stored latents, over all elements."""
    errors = []
    for start in range(0, len(indices), BATCH):
        held = reader.batch(indices[start : start + BATCH])
        x0 = student(teacher.to_device(held.noise), teacher.encode_prompts(held.prompts))
        errors.append((x0 - teacher.to_device(held.latent)).square().mean((1, 2, 3)))
    return float(torch.cat(errors).mean())


def _card(
    method: MethodConfig,
    training: TrainingSettings,
    held_out: int,
    sources: list[Artifact],
    inputs: Mapping[str, Artifact],
    start: Artifact | None,
    held_out_mse: float,
    fingerprint: str,
    usage: str,
) -> str:
    """The model card: how it was made, from what, how good, and the exact call."""
    pairs = sources[0]
    assert isinstance(pairs.stage, Pairs)
    teacher = pairs.inputs["teacher"]
    source = teacher.record.get("metrics", {})
    origin = source.get("source") or "trained by Retort"
    at = f" at {source['revision']}" if source.get("revision") else ""
    sampler = pairs.stage.sampler
    count = sum(source.stage.count for source in sources if isinstance(source.stage, Pairs))
    names = ", ".join(f"pairs/{source.fingerprint}" for source in sources)
    begun = f"It went on from distill/{start.fingerprint}." if start else "It began with the teacher's weights."
    return f"""---
library_name: diffusers
license: {source.get("licence") or ("apache-2.0" if origin.startswith("trained") else "unknown")}
---
# One-step student

Distilled by Retort (distill/{fingerprint}) with `{_method_and_loss(method)}`, {training.steps} steps of
{training.batch_size}, from {count - held_out} pairs ({names}) of a teacher
({origin}{at}; teacher/{teacher.fingerprint}; licence: {source.get("licence") or "not stated"}) solved by
{sampler.name.upper()} in {sampler.steps} steps at guidance {sampler.guidance_scale}, which is built in. {begun}

{_looked_through(inputs)}Mean squared error to the teacher's latents on {held_out} held-out pairs: {held_out_mse:.4f}.

```python
{usage}
```
"""


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
