"""The solver's part of a manifest: what it does, and how it is carried out."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Execution


class Sampler(Config):
    """How a teacher's ODE is solved. guidance_scale is diffusers' (1 = the conditional output itself)."""

    name: Literal["ddim"] = "ddim"
    steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(3.0, ge=1)
    timestep_spacing: Literal["trailing", "leading"] = "trailing"

    @model_validator(mode="after")
    def _leading_needs_room(self) -> Self:
        if self.timestep_spacing == "leading" and self.steps > 500:
            raise ValueError("leading timesteps, which start one late, exist for at most 500 steps")
        return self


class PairsExecution(Execution):
    micro_batch: int = Field(64, ge=1, description="samples solved at once; guidance doubles what the network sees")
    compile: bool = Field(False, description="torch.compile the network")
