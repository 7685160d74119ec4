"""Runs an evaluation: samples every side, measures it, and writes the page."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from stages.base import SCRATCH, Artifact, Progress, StageError
from stages.evaluate.config import EvaluationExecution, Split
from stages.evaluate.noises import Noises
from stages.pairs import Pairs, stored_scale
from stages.probe import Probe
from stages.training.players import PREVIEWS


def evaluate(
    pairs: Artifact,
    student: Artifact | None,
    steps: int | None,
    noises: Noises,
    split: Split,
    guidance_scale: float | None,
    teacher_steps: list[int],
    probe: Artifact | None,
    execution: EvaluationExecution,
    output: Path,
    threads: int,
) -> Generator[Progress, None, dict[str, Any]]:
    """Write `metrics.json` and the files of `page.write` to `output`. Return the metrics. Raises StageError."""
    from stages.data.images.load import load
    from stages.data.images.sealed import images_of
    from stages.evaluate import measure, page
    from stages.evaluate.sides import sample_sides
    from stages.networks.compute import prepare

    prepare(threads)
    real = None
    if probe:  # first, so that problems with its images are reported before sampling
        assert isinstance(probe.stage, Probe)
        unseen = load(images_of(probe), held_out=True, limit=probe.stage.limit, scratch=output / SCRATCH)
        real = measure.two_real_sets(unseen, noises.count)
    sides, setting = yield from sample_sides(pairs, student, steps, noises, guidance_scale, teacher_steps, execution)
    metrics: dict[str, Any] = {
        "samples": noises.count,
        "split": split,
        "student": student and student.fingerprint,
        "dtype": str(setting.teacher.dtype).removeprefix("torch."),
        "micro_batch": min(execution.micro_batch, noises.count),
        "sides": {side.name: measure.against_teacher(side, sides[0], setting.teacher) for side in sides},
    }
    assert isinstance(pairs.stage, Pairs)
    scale = guidance_scale or pairs.stage.sampler.guidance_scale
    if scale != stored_scale([pairs]):
        metrics["guidance_scale"] = scale
    shown = page.columns(noises.count, setting.teacher.decode(sides[0].latents[:1]).shape[-1])
    pictures = {side.name: setting.teacher.decode(side.latents[shown]).numpy() for side in sides}
    if probe and real:
        try:
            yield from measure.against_real(metrics, sides, setting, probe, real)
        except ValueError as error:
            raise StageError(f"evaluation against real images: {error}") from error
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    about = {
        "pairs": pairs.fingerprint,
        "teacher": pairs.inputs["teacher"].fingerprint,
        "seed": pairs.seed,
        "samples": [setting.samples[i] for i in shown],
        "prompts": [setting.prompts[i] for i in shown],
    }
    page.write(output, metrics, pictures, about, student.folder / PREVIEWS if student else None)
    return {**metrics, "device": setting.teacher.device_name}
