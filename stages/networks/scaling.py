"""Conversion of latents between a VAE and a diffusion network: a shift and a scale, for all channels or for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def to_network(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return (latents - shift) * scale, for latents (B, C, h, w) of a VAE. `config` is the VAE's: `scaling_factor` and
    `shift_factor`, or, for each channel, `latents_std` and `latents_mean`."""
    scale, shift = _scale(latents, config), _shift(latents, config)
    return latents * scale if shift is None else (latents - shift) * scale


def to_vae(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return latents / scale + shift, the inverse of `to_network`."""
    scale, shift = _scale(latents, config), _shift(latents, config)
    return latents / scale if shift is None else latents / scale + shift


def _scale(latents: Tensor, config: Mapping[str, Any]) -> Any:
    factor, std = config.get("scaling_factor") or 1.0, config.get("latents_std")
    return factor if std is None else factor / _by_channel(latents, std)


def _shift(latents: Tensor, config: Mapping[str, Any]) -> Any:
    mean = config.get("latents_mean")
    return config.get("shift_factor") if mean is None else _by_channel(latents, mean)


def _by_channel(latents: Tensor, values: Any) -> Tensor:
    return latents.new_tensor(values).view(1, -1, *[1] * (latents.ndim - 2))
