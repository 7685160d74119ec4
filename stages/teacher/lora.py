"""Fuses a LoRA into the weights of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.base import Progress, StageError
from stages.networks.adapter import INDEX, read_json
from stages.networks.compute import prepare, show_no_progress_bars

Shape = tuple[int, ...]
"""(out, in) of a linear layer's weight, (out, in, height, width) of a convolution's."""


def fuse(folder: Path, file: Path, scale: float, output: Path, threads: int) -> Generator[Progress, None, None]:
    """Fuse the LoRA in `file`, times `scale`, into the pipeline in `folder`, in float32.

    Write each network that it changes to the subfolder of `output` with its name, the weights in one file. The pipeline
    itself is only read. Raises StageError if the pipeline takes no LoRA, or not this one.
    """
    prepare(threads)
    show_no_progress_bars()
    pipeline = _pipeline(folder)
    layers = _layers(pipeline, file)
    _check(pipeline, layers, file.name)
    changed = sorted({layer.partition(".")[0] for layer in layers})
    yield Progress(0, len(changed), "networks fused")
    for module in ("lora_base", "peft"):  # which warn of networks that the LoRA does not change
        logging.getLogger(f"diffusers.loaders.{module}").setLevel(logging.ERROR)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
    for name in changed:
        getattr(pipeline, name).float()  # the LoRA, too: in half precision B A would be rounded
    pipeline.fuse_lora(changed, lora_scale=scale)
    pipeline.unload_lora_weights()
    for name in changed:
        getattr(pipeline, name).save_pretrained(output / name, max_shard_size="1TB")
    yield Progress(len(changed), len(changed), "networks fused")


def _pipeline(folder: Path) -> Any:
    kind = read_json(folder / INDEX)["_class_name"]
    found: Any = getattr(diffusers, kind, None)
    if not hasattr(found, "load_lora_weights"):
        raise StageError(f"a {kind} loads no LoRA weights; give `lora` with a pipeline that does, or leave it out")
    return found.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)


def _layers(pipeline: Any, file: Path) -> Mapping[str, Shape]:
    """Return the layers that the LoRA in `file` changes, as `unet.mid_block...to_q`, with the shapes of their weights.

    Raises StageError if the file holds anything but LoRA layers."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError:
        raise StageError(
            f"{file.name} is not a safetensors file; Retort reads LoRA weights in no other format"
        ) from None
    if not any("lora" in name for name in names):
        raise StageError(f"{file.name} is not a LoRA; it holds {_some(names)}")
    if any("dora_scale" in name for name in names):
        raise StageError(f"{file.name} is a DoRA, whose scales diffusers ignores; give a LoRA")
    try:
        return _shapes(_state(pipeline, file))
    except (ValueError, KeyError) as error:
        raise StageError(f"{file.name} has no LoRA format that diffusers reads; it holds {_some(names)}") from error


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and the like" if names else "nothing"


def _state(pipeline: Any, file: Path) -> Mapping[str, Tensor]:
    """Return the LoRA's tensors by the names of peft: `unet.mid_block...to_q.lora_A.weight`."""
    # load_lora_weights reads the file in the same way
    options = {"unet_config": pipeline.unet.config} if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin) else {}
    found = pipeline.lora_state_dict(str(file.parent), weight_name=file.name, use_safetensors=True, **options)
    tensors = found[0] if isinstance(found, tuple) else found
    state: dict[str, Tensor] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in tensors):
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{component}.")}
        network = getattr(pipeline, component, None)
        if isinstance(network, diffusers.ModelMixin) or network is None:
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            if not hasattr(network, "text_model"):  # it is flat in new releases of transformers
                own = {name.removeprefix("text_model."): value for name, value in own.items()}
        state |= {f"{component}.{name}": value for name, value in own.items()}
    return state


def _shapes(state: Mapping[str, Tensor]) -> Mapping[str, Shape]:
    if not all("lora" in name for name in state):
        raise ValueError("some tensors are not of a LoRA")
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    if not layers:
        raise ValueError("no layer has a matrix A")
    return {
        layer: (len(state[f"{layer}.lora_B.weight"]), *state[f"{layer}.lora_A.weight"].shape[1:]) for layer in layers
    }


def _check(pipeline: Any, layers: Mapping[str, Shape], name: str) -> None:
    """Raise StageError if a layer of the LoRA is not in the pipeline, or has another shape there."""
    weights = {
        f"{component}.{layer}": tuple(module.weight.shape)
        for component in pipeline._lora_loadable_modules
        for layer, module in getattr(pipeline, component).named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    missing = [layer for layer in layers if layer not in weights]
    if missing:
        which = "none of its layers is" if len(missing) == len(layers) else f"{len(missing)} of its layers are not"
        raise StageError(f"{name} is a LoRA for another base: {which} in the teacher, such as {missing[0]}")
    for layer, shape in layers.items():
        if shape != weights[layer]:
            own, there = (" x ".join(map(str, one)) for one in (shape, weights[layer]))
            what = f"its layer {layer} has weights of {own}, the teacher's has {there}"
            raise StageError(f"{name} is a LoRA for another base: {what}")
