"""`kind: distill`: train a student on sealed pairs with one of the methods, and export it for plain diffusers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stages.base import SCRATCH, Artifact, Choice, Input, Progress, Stage, StageContext, StageError
from stages.methods import METHODS
from stages.methods.base import MethodConfig, TrainingExecution, TrainingSettings, training_progress
from stages.pairs import Pairs


class Distill(Stage):
    VERSION: ClassVar[int] = 1
    kind: Literal["distill"]
    pairs: Annotated[str, Input("pairs")]
    method: Annotated[MethodConfig, Choice("name", METHODS)]
    training: TrainingSettings
    held_out: int = Field(
        256, ge=1, description="the last pairs, never trained on: for the held-out loss and evaluation"
    )
    execution: TrainingExecution = TrainingExecution()

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        pairs = inputs["pairs"].stage
        assert isinstance(pairs, Pairs)
        if self.held_out >= pairs.count:
            yield "held_out", f"{self.held_out} pairs held out of {pairs.count} leave none to train on"
        if pairs.sampler.timestep_spacing != "trailing":
            yield (
                "pairs",
                "a one-step student needs pairs solved with timestep_spacing: trailing, from the last timestep",
            )
        teacher = inputs["pairs"].inputs["teacher"].stage
        if getattr(teacher, "gaussian", None):
            yield "pairs", "their teacher is `gaussian:`, which has no network that a student could start from"

    def progress_in(self, work: Path, pool: Path) -> str | None:
        return training_progress(work / SCRATCH)

    def run(self, context: StageContext) -> Mapping[str, Any]:
        return context.run(
            distill, self, context.inputs["pairs"], context.seed, context.output, context.threads, context.fingerprint
        )


def distill(
    config: Distill, pairs: Artifact, seed: int, output: Path, threads: int, fingerprint: str
) -> Generator[Progress, None, dict[str, Any]]:
    import json
    import math

    import torch

    from stages.data.order import ShuffledOrder
    from stages.data.pool import read_list
    from stages.data.reader import PairReader
    from stages.diffusion.samplers import timesteps
    from stages.methods.base import Batch, Materials
    from stages.networks.compute import device_of, prepare
    from stages.networks.latent import LatentTeacher
    from stages.networks.student import OneStepStudent, export
    from stages.training import train

    assert isinstance(pairs.stage, Pairs)
    prepare(threads)
    torch.manual_seed(seed)
    teacher = LatentTeacher(pairs.inputs["teacher"].folder, device=device_of(config.execution))
    sampler = pairs.stage.sampler
    grid = timesteps(len(teacher.schedule), sampler.steps, sampler.timestep_spacing)
    method = config.method.create(Materials(teacher, grid, config.training))
    reader = PairReader(read_list(pairs.folder))
    order = ShuffledOrder(len(reader) - config.held_out, config.training.batch_size, seed)

    def batch(step: int) -> Batch:
        drawn = reader.batch(order.batch(step))
        return {
            "noise": torch.from_numpy(drawn.noise).float(),
            "latent": torch.from_numpy(drawn.latent).float(),
            "prompts": drawn.prompts,
        }

    trained = yield from train(method, batch, seed=seed, checkpoints=output / SCRATCH, execution=config.execution)
    student = trained.averages["student"]
    assert isinstance(student, OneStepStudent)
    errors = []
    for start in range(len(reader) - config.held_out, len(reader), config.training.batch_size):
        held = reader.batch(range(start, min(start + config.training.batch_size, len(reader))))
        with torch.no_grad():
            x0 = student(teacher.to_device(held.noise), teacher.encode_prompts(held.prompts))
        errors.append((x0 - teacher.to_device(held.latent)).square().mean((1, 2, 3)))
    held_out_mse = float(torch.cat(errors).mean())
    if not math.isfinite(held_out_mse):
        raise StageError(f"the student's error on held-out pairs is {held_out_mse}; lower training.learning_rate")
    figures = {
        "held_out_mse": held_out_mse,
        "training_loss": trained.history[-1]["loss"],
        "device": trained.device,
    }
    export(student, teacher, output, _card(config, pairs, held_out_mse, fingerprint))
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return figures


def _card(config: Distill, pairs: Artifact, held_out_mse: float, fingerprint: str) -> str:
    """The model card: how it was made, from what, how good, and the exact call."""
    assert isinstance(pairs.stage, Pairs)
    teacher = pairs.inputs["teacher"]
    source = teacher.record.get("metrics", {})
    origin = source.get("source") or "trained by Retort"
    at = f" at {source['revision']}" if source.get("revision") else ""
    sampler = pairs.stage.sampler
    return f"""---
library_name: diffusers
license: {source.get("licence") or ("apache-2.0" if origin.startswith("trained") else "unknown")}
---
# One-step student

Distilled by Retort (distill/{fingerprint}) with `{config.method.name}`, {config.training.steps} steps of
{config.training.batch_size}, from {pairs.stage.count - config.held_out} pairs (pairs/{pairs.fingerprint}) of a teacher
({origin}{at}; teacher/{teacher.fingerprint}; licence: {source.get("licence") or "not stated"}) solved by
{sampler.name.upper()} in {sampler.steps} steps at guidance {sampler.guidance_scale}, which is built in.

Mean squared error to the teacher's latents on {config.held_out} held-out pairs: {held_out_mse:.4f}.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipeline("a prompt", num_inference_steps=1).images[0]  # any guidance_scale gives the same
```
"""
