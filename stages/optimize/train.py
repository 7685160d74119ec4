"""Training of particles, on a worker."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.base import SCRATCH, Artifact, Progress
from stages.data.order import ShuffledOrder
from stages.networks.compute import prepare
from stages.networks.teachers import load_network
from stages.optimize.config import ObjectiveMaterials, RepresentationMaterials
from stages.optimize.representations.base import Representation
from stages.training.loop import train
from stages.training.preview import COLUMNS, Averages, Previews

if TYPE_CHECKING:
    from stages.optimize.stage import Optimize


def optimize(
    stage: Optimize, teacher: Artifact, seed: int, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Train the particles and write them to `output`. Return the last figures.

    `output` also gets history.jsonl with a line for each logged step, the previews and the checkpoints. Raises
    StageError if the particles cannot be trained."""
    prepare(threads)
    torch.manual_seed(seed)
    adapter = load_network(teacher.folder, stage.execution)
    particles = stage.representation.create(RepresentationMaterials(adapter, stage.particles, output))
    method = stage.objective.create(ObjectiveMaterials(adapter, particles, stage.prompt, stage.training))
    order = ShuffledOrder(stage.particles, stage.training.batch_size, seed)
    shown = particles.fixed(COLUMNS)

    def images(averages: Averages) -> NDArray[np.float32]:
        return _averaged_particles(averages).images(shown).numpy()

    captions = [f"particle {number}" for number in shown.particles.tolist()]
    previews = Previews(output, captions, stage.training.steps, stage.execution.previews, images)
    trained = yield from train(
        method,
        lambda step: {"particles": torch.from_numpy(order.batch(step))},
        seed=seed,
        checkpoints=output / SCRATCH,
        execution=stage.execution,
        watch=previews,
    )
    previews.draw()
    _averaged_particles(trained.averages).save(output)
    lines = "".join(json.dumps(line) + "\n" for line in trained.history)
    (output / "history.jsonl").write_text(lines, encoding="utf-8")
    return {"training_loss": trained.losses["particles"], "device": trained.device}


def _averaged_particles(averages: Averages) -> Representation:
    particles = averages["particles"]
    assert isinstance(particles, Representation)
    return particles
