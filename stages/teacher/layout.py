"""Checks which diffusers folders can be a teacher. Reads JSON files only, so that planning needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import StageError
from stages.diffusion.prediction import Prediction


@dataclass(frozen=True)
class Layout:
    """Components by name, with the class each must have (None: any); the files that are taken of them."""

    components: Mapping[str, str | None]
    files: tuple[str, ...]


STABLE_DIFFUSION = Layout(
    {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": None,
        "scheduler": None,
    },
    (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*.*",
        "scheduler/scheduler_config.json",
    ),
)
PIXELS = Layout(
    {"unet": "UNet2DModel", "scheduler": None},
    (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ),
)
PIPELINES = {"StableDiffusionPipeline": STABLE_DIFFUSION, "DDPMPipeline": PIXELS, "DDIMPipeline": PIXELS}

FILES = tuple(dict.fromkeys((*STABLE_DIFFUSION.files, *PIXELS.files)))
"""All that is ever taken of a pipeline's folder: no pickles, no second precision, no safety checker."""

SUPPORTED = (
    "supported teachers: folders or hub ids of Stable Diffusion 1.x or 2.x layout "
    "(StableDiffusionPipeline: UNet2DConditionModel, AutoencoderKL, CLIPTextModel, a scheduler with betas; "
    "safetensors weights), pixel-space ones (DDPMPipeline or DDIMPipeline: UNet2DModel, with classes or without), "
    "`train:` and `gaussian:`"
)

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Noise schedules that diffusers' DDIMScheduler makes."""

IGNORED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that a pipeline may carry and Retort does without."""

CONDITIONS = {
    "UNet2DConditionModel": ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"),
    "UNet2DModel": ("class_embed_type",),
}
"""Settings of a U-Net that make it want more than a timestep and a text, or a class."""


def check(folder: Path) -> Layout:
    """The layout of a folder that Retort can run. Raises StageError, with what is supported, for any other."""
    layout = check_index(folder)
    for pattern in layout.files:
        if not any(folder.glob(pattern)):
            raise StageError(f"{folder} has no {pattern}; {SUPPORTED}")
    unet = _read(folder / "unet" / "config.json")
    if unet.get("in_channels") != unet.get("out_channels"):
        channels = f"{unet.get('in_channels')} channels in and {unet.get('out_channels')} out"
        raise StageError(f"{folder}'s unet has {channels}: it wants more than noise and a prompt; {SUPPORTED}")
    if _sample_size(unet) is None:
        given = unet.get("sample_size")
        raise StageError(f"{folder}'s unet has sample_size: {given}, and does not say what it makes; {SUPPORTED}")
    conditions = CONDITIONS[layout.components["unet"] or ""]
    wanted = next((name for name in conditions if unet.get(name) is not None), None)
    if wanted:
        raise StageError(f"{folder}'s unet has {wanted}: {unet[wanted]}; {SUPPORTED}")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("beta_schedule") not in BETAS and not scheduler.get("trained_betas"):
        raise StageError(
            f"{folder}'s scheduler, {scheduler.get('_class_name')}, has no betas that are known; {SUPPORTED}"
        )
    return layout


def classes(folder: Path) -> int | None:
    """How many classes a pixel-space folder's network knows; None if it is unconditional."""
    found: int | None = _read(folder / "unet" / "config.json").get("num_class_embeds")
    return found


def timesteps(folder: Path) -> int | None:
    """How many a folder's schedule has; None if it cannot be read."""
    try:
        scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    except StageError:
        return None
    betas = scheduler.get("trained_betas")
    found: int | None = len(betas) if betas else scheduler.get("num_train_timesteps")
    return found


def prediction(folder: Path) -> Prediction | None:
    """The prediction type of a folder's network; None if it cannot be read."""
    try:
        scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    except StageError:
        return None
    found: Prediction = scheduler.get("prediction_type", "epsilon")  # diffusers' default
    return found


def image_size(folder: Path) -> tuple[int, int] | None:
    """How many pixels high and wide what a folder's network makes is; None if it cannot be read."""
    try:
        found = check_index(folder)
        size = _sample_size(_read(folder / "unet" / "config.json"))
        halvings = 0 if found is PIXELS else len(_read(folder / "vae" / "config.json")["block_out_channels"]) - 1
    except (StageError, KeyError):  # said when it is adopted
        return None
    return None if size is None else (size[0] * 2**halvings, size[1] * 2**halvings)


def _sample_size(unet: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what a U-Net of such settings denoises; None if they do not say."""
    match unet.get("sample_size"):
        case int(size):
            return size, size
        case [int(height), int(width)]:
            return height, width
    return None


def why_unguided(folder: Path, as_input: bool) -> str | None:
    """Why a folder's network has no output without a condition, or cannot take the strength of guidance as an input;
    None if there is no reason, or it cannot be read."""
    try:
        if check_index(folder) is not PIXELS:
            return None
        known, names = classes(folder), _read(folder / "model_index.json").get("id2label", {})
    except StageError:  # said when it is adopted
        return None
    if known is None:
        return "the teacher is unconditional"
    if len(names) != known - 1:
        return "the teacher has no class that stands for none"
    return "diffusers' UNet2DModel takes no strength of guidance as an input" if as_input else None


def check_index(folder: Path) -> Layout:
    """The part of `check` that needs `model_index.json` alone, before gigabytes are downloaded."""
    index = _read(folder / "model_index.json")
    pipeline = index.get("_class_name", "pipeline")
    layout = PIPELINES.get(pipeline)
    if layout is None:
        raise StageError(f"{folder} is a {pipeline}; {SUPPORTED}")
    for name, kind in layout.components.items():
        found = (index.get(name) or [None, None])[1]
        if found is None or (kind is not None and found != kind):
            raise StageError(f"{folder} is a {pipeline} whose {name} is {found or 'missing'}; {SUPPORTED}")
    known = {*layout.components, *IGNORED}
    for name, value in index.items():
        if name not in known and isinstance(value, list) and value[-1] is not None:
            raise StageError(f"{folder} has a {name}, which is not part of the layout; {SUPPORTED}")
    return layout


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path.parent} has no {path.name}: it is no diffusers pipeline; {SUPPORTED}") from None
    except (ValueError, RecursionError) as error:
        raise StageError(f"{path} is not JSON ({error})") from None
    return dict(value)
