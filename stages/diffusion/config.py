"""Settings of the teacher's ODE solver and of its execution, and ranges of timesteps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, Strict, WrapValidator, model_validator

from stages.base import Config, Execution


def _times(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError("should be two numbers between 0 and 1, the first less than the second")
    return value


TimeRange = Annotated[tuple[float, float], Strict(False), AfterValidator(_times)]
"""Two fractions of T, the number of timesteps, between which timesteps are drawn."""


Scale = float | tuple[float, float]
"""One guidance scale for all samples, or a range from which the scale of each sample is drawn uniformly."""


def _scale(value: Any, _handler: Any) -> Scale:
    """Validate a scale or a range, with one error message. A union of types would give one message for each type."""
    several = isinstance(value, list | tuple)
    numbers = list(value) if several else [value]
    if not all(isinstance(number, float | int) and not isinstance(number, bool) for number in numbers):
        raise ValueError("should be a number, or a list of two numbers")
    if several and (len(numbers) != 2 or not 1 <= numbers[0] < numbers[1]):
        raise ValueError("should be two numbers: the first at least 1, the second greater than the first")
    if not numbers[0] >= 1:
        raise ValueError("should be greater than or equal to 1")
    return (float(numbers[0]), float(numbers[1])) if several else float(value)


def covers(learned: Scale, scale: Scale) -> bool:
    """Whether a student that learned the scale or range `learned` can be sampled at `scale`. If `scale` is a range: at
    all scales in it."""
    (least, most), (low, high) = (one if isinstance(one, tuple) else (one, one) for one in (learned, scale))
    return least <= low and high <= most


def in_words(scale: Scale) -> str:
    """Return a guidance scale as it is written in a manifest: 3 or [1, 8]."""
    return f"[{scale[0]:g}, {scale[1]:g}]" if isinstance(scale, tuple) else f"{scale:g}"


class Sampler(Config):
    """How the teacher's ODE is solved, from noise to data.

    `ddim` is a first-order solver (2010.02502). `dpmpp_2m` is DPM-Solver++(2M), a second-order solver (2211.01095).
    `heun` is Heun's method (2206.00364), a second-order solver that calls the network twice in each step except the
    last.
    """

    name: Literal["ddim", "dpmpp_2m", "heun"] = Field(
        "ddim",
        description="solver; ddim: first order (2010.02502); dpmpp_2m: DPM-Solver++(2M), second order, needs fewer "
        "steps (2211.01095); heun: second order, two network calls in each step except the last",
    )
    steps: int = Field(50, ge=1, le=1000, description="solver steps from noise to data")
    guidance_scale: Annotated[Annotated[float, Field(ge=1)] | tuple[float, float], WrapValidator(_scale)] = Field(
        3.0,
        description="scale of classifier-free guidance, as in diffusers; 1 means no guidance and halves the cost; a "
        "range such as [1.0, 8.0] draws a scale for each pair, and one-step students then take the scale as an input",
    )
    timestep_spacing: Literal["trailing", "leading"] = Field(
        "trailing",
        description="trailing: start at the noisiest timestep, which one-step students need; leading: start at a less "
        "noisy timestep",
    )

    @model_validator(mode="after")
    def _leading_needs_room(self) -> Self:
        if self.timestep_spacing == "leading" and self.steps > 500:
            raise ValueError("leading timesteps exist for at most 500 steps")
        return self

    @property
    def network_calls(self) -> int:
        """Network calls for one sample. Guidance doubles them."""
        calls = 2 * self.steps - 1 if self.name == "heun" else self.steps
        return calls if self.guidance_scale == 1 else 2 * calls


class PairsExecution(Execution):
    """How a pairs stage is run. Receipts of shards record these settings, but changing them makes nothing stale."""

    micro_batch: int = Field(64, ge=1, description="samples solved at once; guidance doubles the network's batch")
    compile: bool = Field(False, description="compile the network with torch.compile")
