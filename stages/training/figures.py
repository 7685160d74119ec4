"""The figures that training logs, and the detection of invalid ones.

A figure is a scalar, or a tensor (B,) with a value for each sample. The mean of the latter is logged.
Values stay on the GPU until they are read, so that training steps need not wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_LOSS = 1e6
"""A loss with a larger magnitude counts as diverged. All of Retort's losses are averages of order one."""
NEVER = -1
"""The step of a figure that was never invalid, and the sample of a figure without samples."""
VARIANCE = "variance_ratio"
"""The figure that is the variance of a student's samples over a batch, relative to that of the data."""
LEAST_VARIANCE, PATIENCE = 0.01, 50
"""A student whose VARIANCE stays below the first number for this many steps has collapsed."""


class Invalid(NamedTuple):
    """The first invalid value of a figure."""

    name: str
    step: int
    value: float
    sample: int | None = None
    """The first sample of the batch that is not finite. None if the figure is a scalar."""

    def describe(self) -> str:
        """Return what is wrong, and what may help."""
        name = self.name.replace("_", " ")
        if self.name.endswith(VARIANCE) and math.isfinite(self.value):
            return (
                f"the student has collapsed: from step {self.step} on, its samples had less than {LEAST_VARIANCE:.0%} "
                f"of the variance of the data for {PATIENCE} steps (the {name} was {self.value:.2g})"
            )
        sample = "" if self.sample is None else f", sample {self.sample} of the batch"
        return f"the {name} is {self.value:.4g} at step {self.step}{sample}"


def of_samples(x: Tensor, data: Tensor | None) -> dict[str, Tensor]:
    """Return figures of a student's samples x (B, C, H, W): VARIANCE, and the share of saturated values.

    The variance is that over the batch, averaged over elements. A value is saturated if it is outside the range of
    `data`, real latents or the teacher's. Without data, the variance is compared with 1, about that of the latents of
    a VAE, and no value counts as saturated."""
    x = x.detach().float()
    variance = x.var(0, unbiased=False).mean()
    if data is None:
        return {VARIANCE: variance}
    outside = (x < data.min()) | (x > data.max())
    return {VARIANCE: variance / data.float().var(0, unbiased=False).mean(), "saturated": outside.float().mean()}


class Figures:
    """Keeps the last value and the first invalid value of each figure. A step may omit figures."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._invalid: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """Name -> (first step at which the figure was invalid, or NEVER; value and sample at that step)."""
        self._low: dict[str, Tensor] = {}
        """Name of a VARIANCE -> the step since which it is too low, or NEVER."""

    def add(self, figures: Mapping[str, Tensor], step: int) -> None:
        """Add the figures of one step. This method does not wait for the GPU."""
        for name, values in figures.items():
            self._last[name] = value = values.mean() if values.ndim else values
            never = torch.full_like(value, NEVER)
            since, was, whose = self._invalid.get(name, (never, value, never))
            valid = value.isfinite() & (value.abs() <= MAX_LOSS) if name.endswith("loss") else value.isfinite()
            first: Tensor | int = step
            if name.endswith(VARIANCE):
                low = self._low.get(name, never).to(value)
                self._low[name] = low = torch.where(
                    value >= LEAST_VARIANCE, NEVER, torch.where(low == NEVER, step, low)
                )
                valid = valid & ((low == NEVER) | (step - low < PATIENCE))
                first = torch.where(value.isfinite(), low, step)
            sample = (~values.isfinite()).float().argmax() if values.ndim else never
            now = (since == NEVER) & ~valid
            self._invalid[name] = (
                torch.where(now, first, since),
                torch.where(now, value, was),
                torch.where(now, sample, whose),
            )

    def numbers(self) -> dict[str, float]:
        """Return the last value of each figure. This method waits for the GPU."""
        return {name: float(value) for name, value in self._last.items()}

    def first_invalid(self) -> Invalid | None:
        """Return the first invalid figure, or None if all figures were valid.

        A figure is invalid if it is not finite. A loss is also invalid if its magnitude is above MAX_LOSS, and a
        VARIANCE if it stays too low. Among the figures of a step, those that name a sample come first."""
        invalid = [
            Invalid(name, int(since), float(was), None if whose == NEVER else int(whose))
            for name, (since, was, whose) in self._invalid.items()
            if since != NEVER
        ]
        return min(invalid, key=lambda found: (found.step, found.sample is None), default=None)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values. This method waits for the GPU."""
        return {"last": self.numbers(), "low": {name: int(since) for name, since in self._low.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self._last = {name: torch.tensor(number) for name, number in state["last"].items()}
        self._low = {name: torch.tensor(float(since)) for name, since in state["low"].items()}
