"""Makes the exact teacher of a set of images: encodes the images with the VAE of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from stages.base import SCRATCH, Execution, Progress, StageError
from stages.data.files import write_atomically
from stages.data.images.load import load
from stages.networks.adapters import adapter_of
from stages.networks.compute import device_of, prepare
from stages.networks.exact import FILE, LATENTS
from stages.teacher.config import EPSILON, ExactSettings
from stages.teacher.encoding import encoded


def write_exact(
    settings: ExactSettings, execution: Execution, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Encode the images and write the files of an exact teacher to `output`, which holds the pipeline.

    Returns the number of images and of captions, and the standard deviation of the latents. Raises StageError if the
    images do not have the size of the pipeline's images, or if the pipeline predicts epsilon and `zero_terminal_snr`
    is set.
    """
    prepare(threads)
    (output / FILE).unlink(missing_ok=True)  # left by an interrupted attempt
    adapter = adapter_of(output)
    if settings.zero_terminal_snr:
        if adapter.prediction_of(output) == "epsilon":
            raise StageError(f"exact.zero_terminal_snr: {EPSILON}")
        scheduler = output / "scheduler" / "scheduler_config.json"
        config = {**json.loads(scheduler.read_text(encoding="utf-8")), "rescale_betas_zero_snr": True}
        write_atomically(scheduler, (json.dumps(config, indent=2) + "\n").encode("utf-8"))
    teacher = adapter(output, device=device_of(execution))
    images = load(settings.images, limit=settings.count, scratch=output / SCRATCH)
    if settings.count and len(images) < settings.count:
        raise StageError(f"exact.count: the image set has only {len(images)} images, not {settings.count}")
    latents = (yield from encoded(teacher, images, "exact.images")).numpy()
    captions = images.captions if settings.captions == "full" else [""] * len(images)
    np.save(output / LATENTS, latents, allow_pickle=False)
    about = {"spread": settings.spread, "captions": captions}
    # last, because this file marks the folder as an exact teacher
    write_atomically(output / FILE, (json.dumps(about) + "\n").encode("utf-8"))
    return {"images": len(images), "captions": len(set(captions)), "latent_std": float(latents.std())}
