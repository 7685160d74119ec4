"""Classifier-free guidance (Ho and Salimans 2022, 2207.12598)."""

from __future__ import annotations

from stages.diffusion.prediction import Array


def guide(unconditional: Array, conditional: Array, scale: float) -> Array:
    """The guided output, with diffusers' scale s = 1 + w: s = 1 is the conditional output itself."""
    return unconditional + scale * (conditional - unconditional)
