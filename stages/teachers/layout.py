"""Which diffusers folders Retort can take as a teacher. Reads JSON only: planning needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.base import StageError

COMPONENTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": None,
    "scheduler": None,
}
SUPPORTED = (
    "supported teachers: folders or hub ids of Stable Diffusion 1.x or 2.x layout "
    "(StableDiffusionPipeline: UNet2DConditionModel, AutoencoderKL, CLIPTextModel, a scheduler with betas; "
    "safetensors weights), `train:` and `gaussian:`"
)
FILES = (
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*.*",
    "scheduler/scheduler_config.json",
)
"""What is taken of a pipeline's folder: no pickles, no second precision, no safety checker."""


IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that a pipeline may carry and Retort does without."""

CONDITIONS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Settings of a U-Net that make it want more than a timestep and a text."""


def check(folder: Path) -> None:
    """Raise StageError, with what is supported, unless `folder` is a teacher that Retort can run."""
    check_index(folder)
    for pattern in FILES:
        if not any(folder.glob(pattern)):
            raise StageError(f"{folder} has no {pattern}; {SUPPORTED}")
    unet = _read(folder / "unet" / "config.json")
    if unet.get("in_channels") != unet.get("out_channels"):
        channels = f"{unet.get('in_channels')} channels in and {unet.get('out_channels')} out"
        raise StageError(f"{folder}'s unet has {channels}: it wants more than noise and text; {SUPPORTED}")
    wanted = next((name for name in CONDITIONS if unet.get(name) is not None), None)
    if wanted:
        raise StageError(f"{folder}'s unet has {wanted}: {unet[wanted]}; {SUPPORTED}")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    if not scheduler.get("beta_schedule") and not scheduler.get("trained_betas"):
        raise StageError(f"{folder}'s scheduler, {scheduler.get('_class_name')}, has no betas; {SUPPORTED}")


def check_index(folder: Path) -> None:
    """The part of `check` that needs `model_index.json` alone, before gigabytes are downloaded."""
    index = _read(folder / "model_index.json")
    pipeline = index.get("_class_name", "pipeline")
    if pipeline != "StableDiffusionPipeline":
        raise StageError(f"{folder} is a {pipeline}; {SUPPORTED}")
    for name, kind in COMPONENTS.items():
        found = (index.get(name) or [None, None])[1]
        if found is None or (kind is not None and found != kind):
            raise StageError(f"{folder} is a {pipeline} whose {name} is {found or 'missing'}; {SUPPORTED}")
    known = {*COMPONENTS, *IGNORED}
    for name, value in index.items():
        if name not in known and isinstance(value, list) and value[-1] is not None:
            raise StageError(f"{folder} has a {name}, which is not part of the layout; {SUPPORTED}")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path.parent} has no {path.name}: it is no diffusers pipeline; {SUPPORTED}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(f"{path} is not JSON ({error})") from None
    return dict(value)
