"""Makes the exact teacher of a set of images: encodes the images with the VAE of the pipeline."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.base import SCRATCH, Execution, Progress, StageError
from stages.data.images.load import load
from stages.networks.adapters import adapter_of
from stages.networks.compute import device_of, prepare
from stages.networks.exact import FILE, LATENTS
from stages.teacher.config import ExactSettings

BATCH = 64
"""Images in a batch. Bits of a latent may depend on its batch."""


def write_exact(
    settings: ExactSettings, execution: Execution, output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Encode the images and write the files of an exact teacher to `output`, which holds the pipeline.

    Returns the number of images and of captions, and the standard deviation of the latents. Raises StageError if the
    images do not have the size of the pipeline's."""
    prepare(threads)
    teacher = adapter_of(output)(output, device=device_of(execution))
    images = load(settings.images, limit=settings.count, scratch=output / SCRATCH)
    if settings.count and len(images) < settings.count:
        raise StageError(f"exact.count: the image set has only {len(images)} images, not {settings.count}")
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(teacher.encode(torch.from_numpy(images.pixels(slice(start, start + BATCH)))).cpu().numpy())
        yield Progress(min(start + BATCH, len(images)), len(images), "images")
    latents = np.concatenate(parts).astype(np.float32)
    if latents.shape[1:] != teacher.latent_shape:
        size = " x ".join(str(side * teacher.down_sampling) for side in teacher.latent_shape[1:])
        raise StageError(f"exact.images: they have {settings.images.size} pixels; the pipeline takes {size}")
    captions = images.captions if settings.captions == "full" else [""] * len(images)
    np.save(output / LATENTS, latents, allow_pickle=False)
    about = {"spread": settings.spread, "captions": captions}
    (output / FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
    return {"images": len(images), "captions": len(set(captions)), "latent_std": float(latents.std())}
