"""AutoencoderTiny (TAESD), a small decoder that replaces the VAE's in losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from stages.base import StageError


def tiny_decoder(source: str, revision: str | None, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load a frozen AutoencoderTiny from a folder or hub id, and return its decoder.

    The decoder maps latents (B, `channels`, h, w), multiplied by the teacher's scaling factor, to images (B, 3, H, W)
    in [-1, 1], not clamped. Raises StageError if it cannot be loaded or has another number of latent channels."""
    try:
        vae = AutoencoderTiny.from_pretrained(source, revision=revision, use_safetensors=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise StageError(f"{source} cannot be loaded as an AutoencoderTiny: {first}") from error
    if vae.config["latent_channels"] != channels:
        expected = f"{vae.config['latent_channels']} channels, the teacher's have {channels}"
        raise StageError(f"tiny_vae: {source} decodes latents of {expected}")
    vae = vae.to(device).eval().requires_grad_(False)
    factor = vae.config["scaling_factor"]
    return lambda latents: vae.decode(latents / factor).sample
