"""Classifier-free guidance (Ho and Salimans 2022, 2207.12598)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.diffusion.prediction import Array


def guide(unconditional: Array, conditional: Array, scale: float) -> Array:
    """The guided output, with diffusers' scale s = 1 + w: s = 1 is the conditional output itself."""
    return unconditional + scale * (conditional - unconditional)


def guide_by(unconditional: Array, conditional: Array, w: Array) -> Array:
    """The same with the paper's w = s - 1 (Meng et al. 2023, 2210.03142): bit for bit the conditional output at 0."""
    return conditional + w * (conditional - unconditional)


def embed(w: Tensor, width: int) -> Tensor:
    """w (B,) as sines and cosines (B, width), as diffusers' pipelines embed `guidance_scale - 1`."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = 1000.0 * w.float()[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], 1)


def draw(w_range: tuple[float, float], count: int) -> Tensor:
    """w (B,), evenly from a range, on the CPU."""
    least, most = w_range
    return least + (most - least) * torch.rand(count)
