"""The discriminator of Diffusion2GAN: a diffusion U-Net whose features are judged at every scale of its decoder."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stages.base import StageError
from stages.networks.network import NetworkTeacher

T_OF_CLEAN = 0
"""The timestep at which the U-Net is called: the one of clean latents, which are what it judges."""


class DiffusionDiscriminator(nn.Module):
    """D(c, z, x) as maps of logits (Kang et al. 2024, 2405.05967, section 3.3).

    A U-Net with a diffusion model's weights. The text c enters through its cross-attention, the noise z through a
    convolution added to that of the input. Where the encoder halves, the resized image enters once more. At every
    scale of the decoder three features are judged: the skip connection, what comes from below before it meets the
    skip, and what the block made of both, before it is made larger. Without `multi_scale` only the last of these at
    the finest scale is, which is what the U-Net's own output layer reads.

    The new ways in begin at zero: the first features are the diffusion model's own. A read-out has the form of the
    U-Net's own output layer: group norm, SiLU, 3x3 convolution. Neither this nor the timestep is published.
    """

    def __init__(self, unet: Any, noise: bool = True, multi_scale: bool = True) -> None:
        super().__init__()
        strange = [type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks) if not _is_plain(block)]
        if strange:
            raise StageError(
                f"no discriminator can be made of the teacher's U-Net: its {strange[0]} passes an image beside features"
            )
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()  # what they would put out nobody reads
        self.unet: Any = unet
        self.t: Tensor
        self.register_buffer("t", torch.tensor(T_OF_CLEAN), persistent=False)
        self.noise = _way_in(unet, unet.conv_in.out_channels) if noise else None
        self._halving = [block for block in unet.down_blocks if block.downsamplers] if multi_scale else []
        self.resized = nn.ModuleList(_way_in(unet, block.resnets[-1].out_channels) for block in self._halving)
        below, channels = unet.config["block_out_channels"][-1], []
        for block in unet.up_blocks:
            out = block.resnets[-1].out_channels
            channels += [block.resnets[0].in_channels - below, below, out]
            below = out
        self._judged = slice(None) if multi_scale else slice(-1, None)
        self.heads = nn.ModuleList(_head(n, unet.config["norm_num_groups"]) for n in channels[self._judged])

    @classmethod
    def from_teacher(
        cls, teacher: NetworkTeacher, weights: Literal["teacher", "random"], noise: bool, multi_scale: bool
    ) -> DiffusionDiscriminator:
        """With a copy of the teacher's weights, or with the same U-Net's before any training."""
        copied = copy.deepcopy(teacher.unet) if weights == "teacher" else teacher.UNET.from_config(teacher.unet.config)
        return cls(copied.requires_grad_(True), noise, multi_scale)

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None) -> list[Tensor]:
        """x, noise (B, C, H, W), condition as the teacher's `encode_prompts` gives it -> logits: of each scale of the
        decoder, the coarsest first, three maps (B, h, w), of its skip, what came from below, and both together."""
        if condition is not None and condition.is_floating_point():
            condition = condition.to(x.dtype)
        with self._listening(x, noise) as features:
            self.unet(x, self.t, condition)
        return [head(f).squeeze(1) for head, f in zip(self.heads, features[self._judged], strict=True)]

    @contextmanager
    def _listening(self, x: Tensor, noise: Tensor) -> Iterator[list[Tensor]]:
        """Hooks for one call: they bring in noise and resized images, and gather features.

        None is inside of what diffusers checkpoints (single resnets and attentions), where it would be called again
        in the backward pass: up- and down-samplers are not.
        """
        features: list[Tensor] = []

        def enter(layer: nn.Module, image: Tensor) -> Any:
            return lambda _module, _args, output: output + layer(interpolate(image, output.shape[2:], mode="area"))

        def before(block: nn.Module, args: Any, kwargs: Any) -> None:
            given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
            features.extend([given["res_hidden_states_tuple"][-1], given["hidden_states"]])

        with ExitStack() as hooks:
            if self.noise is not None:
                hooks.enter_context(self.unet.conv_in.register_forward_hook(enter(self.noise, noise)))
            for block, layer in zip(self._halving, self.resized, strict=True):
                hooks.enter_context(block.downsamplers[-1].register_forward_hook(enter(layer, x)))
            for block in self.unet.up_blocks:
                hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(
                    block.upsamplers[0].register_forward_pre_hook(lambda _module, args: features.append(args[0]))
                    if block.upsamplers
                    else block.register_forward_hook(lambda _module, _args, output: features.append(output))
                )
            yield features


def _is_plain(block: Any) -> bool:
    """Whether it takes features and skips alone, as all of Stable Diffusion's do."""
    return not hasattr(block, "skip_conv") and not hasattr(block, "skip_norm")


def _way_in(unet: Any, width: int) -> nn.Conv2d:
    """From an image to features that are added to the U-Net's: zero at first, though not its gradient."""
    layer = nn.Conv2d(unet.config["in_channels"], width, 3, padding=1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _head(channels: int, groups: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))
