"""Protocols of the standard metrics, as in published work. Imports no torch.

Papers do not publish all values. Comments and docstrings say which ones Retort chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Preset = Literal["coco2014_30k", "coco2017_5k", "sdxl_10k", "cifar10_50k"]

DIVERSITY_PROMPTS, DIVERSITY_IMAGES = 100, 4
"""The number of prompts for LPIPS diversity, and of images for each prompt. Papers do not publish these numbers."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""The number of random subsets over which KID is averaged, and of images in each (1801.01401, and torch-fidelity's
defaults)."""
PATCH = 299
"""The width in pixels of the centre crop for the patch FID (SDXL-Lightning, DMD2)."""


@dataclass(frozen=True)
class Protocol:
    """How many images are measured, and how they are scaled.

    samples: generated images. image_size: the width in pixels to which images are scaled first, by Lanczos' filter;
    None: they are not scaled. resize: how Inception's input is scaled to 299 pixels: clean, by Pillow's bicubic filter
    (clean-fid, 2104.11222), or legacy, by the bilinear filter of TensorFlow 1 (torch-fidelity). patch: whether the
    patch FID is measured, on images that are not scaled. clip_prefix: text before each prompt for the CLIP score.
    """

    samples: int
    image_size: int | None = None
    resize: Literal["clean", "legacy"] = "clean"
    patch: bool = False
    clip_prefix: str = ""


PROTOCOLS: dict[Preset, Protocol] = {
    # 30,000 prompts of val2014, 512 to 256 pixels, clean-fid against its 40,504 images (GigaGAN, DMD)
    "coco2014_30k": Protocol(30_000, 256, clip_prefix="A photo depicts "),
    # 5,000 prompts and images of val2017 (2210.03142); scaled to 512 pixels and by clean-fid, which is our choice
    "coco2017_5k": Protocol(5_000, 512),
    # 10,000 prompts, scaled to 512 pixels, against the images of these prompts (DMD2, SDXL-Lightning)
    "sdxl_10k": Protocol(10_000, 512, patch=True, clip_prefix="A photo depicts "),
    # 50,000 images against the training images, with TensorFlow's resizing (EDM, torch-fidelity)
    "cifar10_50k": Protocol(50_000, resize="legacy"),
}
