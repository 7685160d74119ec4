"""The solver's part of a manifest: what it does, and how it is carried out."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Execution


class Sampler(Config):
    """How a teacher's ODE is solved. guidance_scale is diffusers' (1 = the conditional output itself).

    `dpmpp_2m` is DPM-Solver++(2M). `heun` calls the network twice a step, but for the last.
    """

    name: Literal["ddim", "dpmpp_2m", "heun"] = Field(
        "ddim",
        description="the solver: first order (2010.02502); DPM-Solver++(2M) (2211.01095), which needs fewer "
        "steps; or Heun's, second order, twice the network calls",
    )
    steps: int = Field(50, ge=1, le=1000, description="of the solver, from noise to data")
    guidance_scale: float = Field(
        3.0,
        ge=1,
        description="strength of classifier-free guidance, as diffusers counts it: 1 is none, and half the cost",
    )
    timestep_spacing: Literal["trailing", "leading"] = Field(
        "trailing", description="trailing starts at the noisiest timestep, as one-step students need; leading does not"
    )

    @model_validator(mode="after")
    def _leading_needs_room(self) -> Self:
        if self.timestep_spacing == "leading" and self.steps > 500:
            raise ValueError("leading timesteps, which start one late, exist for at most 500 steps")
        return self

    @property
    def network_calls(self) -> int:
        """For one sample; guidance counts twice."""
        calls = 2 * self.steps - 1 if self.name == "heun" else self.steps
        return calls if self.guidance_scale == 1 else 2 * calls


class PairsExecution(Execution):
    """How pairs are solved. Recorded in receipts, and never a reason to make pairs again."""

    micro_batch: int = Field(64, ge=1, description="samples solved at once; guidance doubles what the network sees")
    compile: bool = Field(False, description="torch.compile the network")
