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
FILES = [
    "model_index.json",
    "*/config.json",
    "*/scheduler_config.json",
    "tokenizer/*",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]
"""What is taken of a pipeline's folder: no pickles, no second precision, no safety checker."""


def check(folder: Path) -> None:
    """Raise StageError, with what is supported, unless `folder` is a teacher that Retort can run."""
    index = _read(folder / "model_index.json")
    for name, kind in COMPONENTS.items():
        found = (index.get(name) or [None, None])[1]
        if found is None or (kind is not None and found != kind):
            raise StageError(
                f"{folder} is a {index.get('_class_name', 'pipeline')} whose {name} is {found or 'missing'}; "
                f"{SUPPORTED}"
            )
    for pattern in FILES:
        if not any(folder.glob(pattern)):
            raise StageError(f"{folder} has no {pattern}; {SUPPORTED}")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    if not scheduler.get("beta_schedule") and not scheduler.get("trained_betas"):
        raise StageError(f"{folder}'s scheduler, {scheduler.get('_class_name')}, has no betas; {SUPPORTED}")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path.parent} has no {path.name}: it is no diffusers pipeline; {SUPPORTED}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StageError(f"{path} is not JSON ({error})") from None
    return dict(value)
