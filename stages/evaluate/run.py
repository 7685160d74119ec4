"""Computes the figures of an evaluation from the parts that its workers measured, and writes the page."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.base import Artifact, Progress, StageError
from stages.evaluate import measure, page
from stages.evaluate.config import Split
from stages.evaluate.parts import SIZE, Measured, Part
from stages.pairs import Pairs, stored_scale
from stages.training.players import PREVIEWS


def evaluate(
    pairs: Artifact,
    student: Artifact | None,
    calls: Mapping[str, int],
    parts: Sequence[Part],
    folder: Path,
    split: Split,
    guidance_scale: float | None,
    probe: Artifact | None,
    reference: Artifact | None,
    micro_batch: int,
    output: Path,
) -> Generator[Progress, None, dict[str, Any]]:
    """Write `metrics.json` and the files of `page.write` to `output`. Return the metrics. Raises StageError.

    calls: name of a side -> its network calls for an image. parts, folder: the parts that the workers measured, and the
    folder of their files.
    """
    samples, real, prompts_alone = (
        Measured(folder, [part for part in parts if part.what == what]) for what in ("samples", "real", "prompts")
    )
    numbers, prompts = ([one for about in samples.about for one in about[key]] for key in ("numbers", "prompts"))
    metrics: dict[str, Any] = {
        "samples": len(numbers),
        "split": split,
        "student": student and student.fingerprint,
        "dtype": samples.about[0]["dtype"],
        "micro_batch": min(micro_batch, SIZE, len(numbers)),
        "sides": {
            side: {"network_calls": count, **measure.against_teacher(samples, side)} for side, count in calls.items()
        },
    }
    assert isinstance(pairs.stage, Pairs)
    scale = guidance_scale or pairs.stage.sampler.guidance_scale
    if scale != stored_scale([pairs]):
        metrics["guidance_scale"] = scale
    if probe:
        try:
            measure.against_real(metrics, samples, real, probe)
        except ValueError as error:
            raise StageError(f"evaluation against real images: {error}") from error
    if reference:
        yield from measure.standard(metrics, samples, prompts_alone, reference)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    strips = {side: samples[f"{side}/shown"] for side in calls}
    columns = page.columns(len(numbers), next(iter(strips.values())).shape[-1])
    order = np.argsort(np.argsort(columns))  # parts hold the shown images in the order of the samples
    about = {
        "pairs": pairs.fingerprint,
        "teacher": pairs.inputs["teacher"].fingerprint,
        "seed": pairs.seed,
        "samples": [numbers[i] for i in columns],
        "prompts": [prompts[i] for i in columns],
    }
    images = {side: strip[order] for side, strip in strips.items()}
    page.write(output, metrics, images, about, student.folder / PREVIEWS if student else None)
    yield Progress(len(numbers), len(numbers), "samples measured")
    return {**metrics, "device": samples.about[0]["device"]}
