"""Fuses a LoRA into the weights of a pipeline.

diffusers renames the layers and fuses the weights. peft adds the LoRA to a network. `load_lora_weights` of diffusers is
not used, for two reasons. transformers 5.24 refuses the newest release of peft, 0.21, for a LoRA of a text encoder. And
`load_lora_weights` gives U-Net layers wrong alphas if a file of kohya's has several.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.base import Progress, StageError
from stages.networks.adapter import INDEX, read_json
from stages.networks.compute import prepare, show_no_progress_bars
from stages.networks.lora import ADAPTER, A, B
from stages.networks.stable_diffusion import ONE_FILE

UNIT = "networks fused"


@dataclass(frozen=True)
class Part:
    """The part of a LoRA that changes one network."""

    state: dict[str, Tensor]
    """The tensors by the names of peft: `mid_block.attentions.0.proj_in.lora_A.weight`."""
    config: LoraConfig

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The layers, with the shapes of the weights that B A is added to."""
        layers = [name.removesuffix(A) for name in self.state if name.endswith(A)]
        return {layer: (len(self.state[layer + B]), *self.state[layer + A].shape[1:]) for layer in layers}


def fuse(folder: Path, file: Path, scale: float, output: Path, threads: int) -> Generator[Progress, None, None]:
    """Fuse the LoRA in `file`, times `scale`, into the pipeline in `folder`, in float32.

    Write each changed network to the subfolder of `output` with its name, the weights in one file. The pipeline itself
    is only read. Raises StageError if the pipeline cannot load the LoRA.
    """
    prepare(threads)
    show_no_progress_bars()
    pipeline = _pipeline(folder)
    parts = _parts(pipeline, file)
    networks = {name: getattr(pipeline, name) for name in pipeline._lora_loadable_modules if name in parts}
    _check(networks, parts, file.name)
    yield Progress(0, len(parts), UNIT)
    for name, network in networks.items():
        inject_adapter_in_model(parts[name].config, network)
        set_peft_model_state_dict(network, parts[name].state)
    pipeline.fuse_lora(list(networks), lora_scale=scale)
    pipeline.unload_lora_weights()
    for name, network in networks.items():
        network.save_pretrained(output / name, max_shard_size=ONE_FILE)
    yield Progress(len(parts), len(parts), UNIT)


def _pipeline(folder: Path) -> Any:
    kind = read_json(folder / INDEX)["_class_name"]
    found: Any = getattr(diffusers, kind, None)
    if not hasattr(found, "load_lora_weights"):
        raise StageError(f"a {kind} loads no LoRA weights; give a pipeline that does, or leave `lora` out")
    return found.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)


def _parts(pipeline: Any, file: Path) -> Mapping[str, Part]:
    """Read the LoRA in `file`. Return its parts by component of the pipeline, in the order of the file.

    Raises StageError if the file holds anything but a LoRA."""
    tensors, settings = _read(file)
    held = f"{next(iter(tensors))} and the like" if tensors else "nothing"
    if not any("lora" in name for name in tensors):
        raise StageError(f"{file.name} is not a LoRA; it holds {held}")
    if any("dora_scale" in name for name in tensors):
        raise StageError(f"{file.name} is a DoRA of kohya's format, which diffusers does not read; give a LoRA")
    try:
        named = _named(pipeline, _without_alphas(tensors))
        return {
            name: _part(getattr(pipeline, name, None), _below(name, named), _below(name, settings))
            for name in dict.fromkeys(name.partition(".")[0] for name in named)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(f"{file.name} has no LoRA format that diffusers reads; it holds {held}") from error


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors in float32, so that B A is not rounded, and peft's settings if the file has them."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            return tensors, json.loads((opened.metadata() or {}).get(ADAPTER, "{}"))
    except SafetensorError:
        raise StageError(
            f"{file.name} is not a safetensors file; Retort reads LoRA weights in no other format"
        ) from None


def _without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file of kohya's format with B times alpha / rank in place of B and alpha.

    Raises KeyError if a layer has an alpha but no LoRA weights."""
    rest = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    for layer in (name.removesuffix(".alpha") for name in tensors.keys() - rest.keys()):
        rank = len(rest[f"{layer}.lora_down.weight"])
        rest[f"{layer}.lora_up.weight"] = rest[f"{layer}.lora_up.weight"] * tensors[f"{layer}.alpha"] / rank
    return rest


def _named(pipeline: Any, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors by the names of diffusers, which begin with the component of the pipeline."""
    options = {}
    if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin):  # its load_lora_weights gives the config, too
        options["unet_config"] = pipeline.unet.config
    found = pipeline.lora_state_dict(tensors, **options)
    return found[0] if isinstance(found, tuple) else found


def _part(network: Any, named: dict[str, Tensor], settings: dict[str, Any]) -> Part:
    """Return the part of a LoRA for `network`, which is None if the pipeline has no component of that name.

    Raises ValueError if a tensor does not belong to a LoRA."""
    if network is None or isinstance(network, diffusers.ModelMixin):
        state = convert_unet_state_dict_to_peft(named)
    else:
        for layout in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
            named = convert_state_dict_to_peft(named, layout)
        flat = not hasattr(network, "text_model")  # in new releases of transformers
        state = {name.removeprefix("text_model.") if flat else name: value for name, value in named.items()}
    ranks = {name.removesuffix(A): len(value) for name, value in state.items() if name.endswith(A)}
    ups = {name.removesuffix(B) for name in state if name.endswith(B)}
    if not ranks or ups != ranks.keys() or not _layers(state) <= ranks.keys():
        raise ValueError("not a LoRA")
    most = max(ranks.values())
    own = {"r": most, "lora_alpha": most, "rank_pattern": ranks, "alpha_pattern": ranks, "target_modules": list(ranks)}
    return Part(state, LoraConfig(**(settings or own)))


def _layers(state: Mapping[str, Tensor]) -> set[str]:
    return {name.rpartition(".lora_")[0] for name in state}


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values whose names start with `prefix` and a dot, and remove that start."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _check(networks: Mapping[str, Any], parts: Mapping[str, Part], file: str) -> None:
    """Raise StageError if a layer of the LoRA is not in the networks, or has another shape there."""
    there = {
        f"{name}.{layer}": tuple(module.weight.shape)
        for name, network in networks.items()
        for layer, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    own = {f"{name}.{layer}": shape for name, part in parts.items() for layer, shape in part.shapes.items()}
    missing = [layer for layer in own if layer not in there]
    if missing:
        which = "none of its layers is" if len(missing) == len(own) else f"{len(missing)} of its layers are not"
        raise StageError(f"{file} is a LoRA for another base: {which} in the teacher, such as {missing[0]}")
    wrong = next((layer for layer, shape in own.items() if shape != there[layer]), None)
    if wrong:
        found, wanted = (" x ".join(map(str, shapes[wrong])) for shapes in (own, there))
        what = f"its layer {wrong} has weights of {found}, the teacher's has {wanted}"
        raise StageError(f"{file} is a LoRA for another base: {what}")
