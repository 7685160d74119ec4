"""Encodes an image set with the VAE of a pipeline."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from stages.base import Progress, StageError
from stages.data.images.labelled import LabelledImages
from stages.networks.adapter import Adapter

BATCH = 64
"""Images in a batch. Bits of a latent may depend on its batch."""


def encoded(pipeline: Adapter, images: LabelledImages, field: str) -> Generator[Progress, None, Tensor]:
    """Return the latents of all images (N, C, h, w), float32, on the CPU.

    Raises StageError if they do not have the size of the pipeline's images. The message names `field`."""
    parts = []
    for start in range(0, len(images), BATCH):
        parts.append(pipeline.encode(torch.from_numpy(images.pixels(slice(start, start + BATCH)))).cpu().float())
        if parts[0].shape[1:] != pipeline.latent_shape:
            size = " x ".join(str(side * pipeline.down_sampling) for side in pipeline.latent_shape[1:])
            raise StageError(f"{field}: the images have {images.images.shape[-1]} pixels; the pipeline takes {size}")
        yield Progress(min(start + BATCH, len(images)), len(images), "images")
    return torch.cat(parts)
