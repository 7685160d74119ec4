"""Classifier-free guidance (Ho and Salimans 2022, 2207.12598)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.diffusion.prediction import Array


def guide(unconditional: Array, conditional: Array, scale: float | Array) -> Array:
    """Guide with diffusers' scale s: output = u + s (c - u), with the unconditional output u and the conditional c.

    `scale` is s, or an array (B, 1, 1, 1) of one s for each sample. s = 1 gives c, up to rounding. s is 1 + w in the
    notation of 2207.12598, eq. 6."""
    return unconditional + scale * (conditional - unconditional)


def guide_by_w(unconditional: Array, conditional: Array, w: Array) -> Array:
    """Guide with w = s - 1: output = c + w (c - u) = (1 + w) c - w u (2207.12598, eq. 6; Meng et al. 2023, 2210.03142).

    w = 0 gives the conditional output c bit for bit."""
    return conditional + w * (conditional - unconditional)


def embed(w: Tensor, width: int) -> Tensor:
    """Embed w (B,) as sines and cosines (B, width), as diffusers' pipelines embed `guidance_scale - 1`.

    Element k is sin(1000 w f_k) and element k + half is cos(1000 w f_k), with f_k = 10000^(-k / (half - 1)) for
    k = 0, ..., half - 1, and half = width / 2. `width` must be even and at least 4."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = 1000.0 * w.float()[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)


def draw_w(w_range: tuple[float, float], count: int) -> Tensor:
    """Draw w (count,) from U[w_min, w_max], on the CPU (2210.03142, section 3.1)."""
    least, most = w_range
    return least + (most - least) * torch.rand(count)
