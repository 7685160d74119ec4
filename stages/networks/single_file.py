"""Stable Diffusion's original layout: all weights of a pipeline in one dictionary, as in Stability's files.

ComfyUI, Automatic1111, Forge and diffusers' `from_single_file` read it. The layout has its own names of modules, and
counts the blocks of the U-Net and the VAE in its own way. Names and numbers are computed from the modules, which may be
of any size and on any device. The inverse is diffusers' `loaders/single_file_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stages.base import StageError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer."
XL_OPEN_CLIP = "conditioner.embedders.1.model."
PREDICTS_V = "v_pred"
"""The key that says that an SDXL network predicts v. Its tensor is empty."""
NO_NAME = ("time_embedding.cond_proj.weight",)
"""Weights of a U-Net that the layout lacks: the guidance embedding, which is zero for students that take no w."""

Places = dict[str, str]
"""Module in diffusers' layout -> module in the original layout."""

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def stable_diffusion(unet: Any, vae: Any, text_encoder: Any) -> dict[str, Tensor]:
    """Return the weights of a Stable Diffusion 1.x or 2.x pipeline by their original names.

    A text encoder with the activation GELU is written as OpenCLIP's (2.x), one with quick GELU as CLIP's (1.x), because
    programs choose the activation by these names. Raises StageError for a weight that the layout has no name for."""
    if text_encoder.config.hidden_act == "gelu":
        text = _prefixed(OPEN_CLIP, _open_clip(text_encoder))
    else:
        text = _prefixed(CLIP, _published(text_encoder))
    return {**_image_networks(unet, vae), **text}


def stable_diffusion_xl(
    unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any, predicts_v: bool
) -> dict[str, Tensor]:
    """Return the weights of an SDXL pipeline by their original names. Raises StageError as `stable_diffusion`."""
    return {
        **_image_networks(unet, vae),
        **_prefixed(XL_CLIP, _published(text_encoder)),
        **_prefixed(XL_OPEN_CLIP, _open_clip(text_encoder_2)),
        **({PREDICTS_V: torch.empty(0)} if predicts_v else {}),
    }


def _image_networks(unet: Any, vae: Any) -> dict[str, Tensor]:
    weights = {name: value for name, value in unet.state_dict().items() if name not in NO_NAME}
    return {
        **_prefixed(UNET, _renamed(weights, UNET_ENDS | dict(_unet_blocks(unet)))),
        **_prefixed(VAE, _vae(vae)),
    }


def _unet_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield the places of all blocks. The layout counts residual blocks and down-sampling as blocks of their own."""
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield from _unet_layer(f"down_blocks.{i}", j, f"input_blocks.{number}.0", f"input_blocks.{number}.1")
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from _unet_layer("mid_block", 0, "middle_block.0", "middle_block.1")
    yield from _unet_layer("mid_block", 1, "middle_block.2")
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield from _unet_layer(f"up_blocks.{i}", j, f"output_blocks.{number}.0", f"output_blocks.{number}.1")
            number += 1
        # Up-sampling follows in the last of these blocks, after its attention if it has one.
        place = 2 if getattr(block, "attentions", None) else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _unet_layer(block: str, layer: int, resnet: str, attention: str = "") -> Iterator[tuple[str, str]]:
    yield from _within(f"{block}.resnets.{layer}", resnet, UNET_RESNET)
    yield f"{block}.attentions.{layer}", attention


def _vae(vae: Any) -> dict[str, Tensor]:
    weights = _renamed(vae.state_dict(), dict(_vae_blocks(vae)))
    attention = [f"mid.attn_1.{layer}.weight" for layer in ("q", "k", "v", "proj_out")]
    return {
        # attention is made of 1x1 convolutions
        name: value[:, :, None, None] if name.endswith(tuple(attention)) else value
        for name, value in weights.items()
    }


def _vae_blocks(vae: Any) -> Iterator[tuple[str, str]]:
    yield from {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}.items()
    down, up = vae.encoder.down_blocks, vae.decoder.up_blocks
    for i, block in enumerate(down):
        for j in range(len(block.resnets)):
            yield from _within(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_RESNET)
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
    for i, block in enumerate(up):
        number = len(up) - 1 - i
        for j in range(len(block.resnets)):
            yield from _within(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{number}.block.{j}", VAE_RESNET)
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{number}.upsample.conv"
    for side in ("encoder", "decoder"):
        for end, place in {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}.items():
            yield f"{side}.{end}", f"{side}.{place}"
        for j in range(2):
            yield from _within(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", VAE_RESNET)
        yield from _within(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)


def _published(text_encoder: Any) -> dict[str, Tensor]:
    """Return the weights of a CLIP text encoder by their published names, which transformers 5.6 shortened."""
    weights = text_encoder.state_dict()
    return {name if name.startswith("text_") else f"text_model.{name}": value for name, value in weights.items()}


def _open_clip(text_encoder: Any) -> dict[str, Tensor]:
    """Return the weights in OpenCLIP's layout: q, k and v are one projection, and the last layer is transposed."""
    weights, fused = _published(text_encoder), {}
    places = {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}
    for i in range(text_encoder.config.num_hidden_layers):
        layer, place = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        places |= dict(_within(layer, place, OPEN_CLIP_LAYER))
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            fused[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
    fused["positional_embedding"] = weights.pop("text_model.embeddings.position_embedding.weight")
    if "text_projection.weight" in weights:
        fused["text_projection"] = weights.pop("text_projection.weight").T
    return {**_renamed(weights, places), **fused}


def _within(module: str, place: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield from ((f"{module}.{name}", f"{place}.{other}") for name, other in names.items())


def _renamed(weights: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the module in each name by its place. Raises StageError if it has none."""
    renamed = {}
    for name, value in weights.items():
        modules = accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}")
        module = next((module for module in modules if module in places), None)
        if module is None:
            raise StageError(f"Stable Diffusion's original layout has no name for {name}")
        renamed[places[module] + name.removeprefix(module)] = value
    return renamed


def _prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}
