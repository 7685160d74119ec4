"""The solver's part of a manifest."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Config


class Sampler(Config):
    """How a teacher's ODE is solved. guidance_scale is diffusers' (1 = the conditional output itself)."""

    name: Literal["ddim"] = "ddim"
    steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(3.0, ge=1)
    timestep_spacing: Literal["trailing", "leading"] = "trailing"
