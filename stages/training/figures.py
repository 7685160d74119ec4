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
"""Stands for the step of a figure that was never invalid, and for the sample of a scalar figure."""
VARIANCE, OF_DATA = "variance", "data_variance"
"""The names of two figures: the variance over a batch, averaged over elements, of a student's samples and of the
data."""
LEAST_VARIANCE, PATIENCE = 0.01, 50
"""A student has collapsed if its VARIANCE is below LEAST_VARIANCE times OF_DATA in PATIENCE consecutive turns."""


class Invalid(NamedTuple):
    """The first invalid value of a figure."""

    name: str
    step: int
    value: float
    sample: int | None = None
    """The first sample of the batch that is not finite. None if the figure is a scalar."""

    def describe(self) -> str:
        """Return a description of the problem."""
        name = self.name.replace("_", " ")
        if self.name.endswith(VARIANCE) and math.isfinite(self.value):
            return (
                f"the student has collapsed: in the {PATIENCE} turns up to step {self.step}, its samples had less than "
                f"{LEAST_VARIANCE:.0%} of the variance of the data (the {name} is {self.value:.2g})"
            )
        sample = "" if self.sample is None else f", sample {self.sample} of a batch"
        return f"the {name} is {self.value:.4g} at step {self.step}{sample}"


def sample_figures(x: Tensor, data: Tensor | None) -> dict[str, Tensor]:
    """Return figures of a student's samples x (B, C, H, W): VARIANCE, OF_DATA and `saturated`.

    `saturated` is the share of values outside the range of `data` (B, C, H, W), real latents or the teacher's. Without
    `data`, OF_DATA is 1, about the variance of a VAE's latents, and the range is -4 to 4. A batch of one sample has no
    variance."""
    x = x.detach().float()
    least, most = (-4.0, 4.0) if data is None else (data.min(), data.max())
    figures = {"saturated": ((x < least) | (x > most)).float().mean()}
    if len(x) > 1:
        figures[VARIANCE] = x.var(0).mean()
        figures[OF_DATA] = torch.ones_like(figures[VARIANCE]) if data is None else data.float().var(0).mean()
    return figures


class Figures:
    """Keeps the last value and the first invalid value of each figure. A step may omit figures."""

    def __init__(self, warmup_steps: int = 0) -> None:
        """In the first `warmup_steps` steps, a low VARIANCE does not count as a collapse, because many students start
        at the mean of the data."""
        self._warmup = warmup_steps
        self._last: dict[str, Tensor] = {}
        self._invalid: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """Name -> (first step at which the figure was invalid, or NEVER; value and sample at that step)."""
        self._low: dict[str, Tensor] = {}
        """Name of a VARIANCE -> the number of consecutive turns, up to the last one, in which it was too low."""

    def add(self, figures: Mapping[str, Tensor], step: int) -> None:
        """Add the figures of one step. This method does not wait for the GPU."""
        for name, values in figures.items():
            self._last[name] = value = values.mean() if values.ndim else values
            never = torch.full_like(value, NEVER)
            old_step, old_value, old_sample = self._invalid.get(name, (never, value, never))
            valid = value.isfinite() & (value.abs() <= MAX_LOSS) if name.endswith("loss") else value.isfinite()
            of_data = figures.get(name.removesuffix(VARIANCE) + OF_DATA)
            if name.endswith(VARIANCE) and of_data is not None and of_data is not values and step >= self._warmup:
                low = self._low.get(name, torch.zeros_like(value)).to(value)
                self._low[name] = low = torch.where(value < LEAST_VARIANCE * of_data, low + 1, 0)
                valid = valid & (low < PATIENCE)
            sample = (~values.isfinite()).float().argmax() if values.ndim else never
            now = (old_step == NEVER) & ~valid
            self._invalid[name] = (
                torch.where(now, step, old_step),
                torch.where(now, value, old_value),
                torch.where(now, sample, old_sample),
            )

    def numbers(self) -> dict[str, float]:
        """Return the last value of each figure. This method waits for the GPU."""
        return {name: float(value) for name, value in self._last.items()}

    def first_invalid(self) -> Invalid | None:
        """Return the first invalid figure, or None if all figures were valid.

        A figure is invalid if it is not finite. A loss is also invalid if its magnitude is above MAX_LOSS, and a
        VARIANCE if it stays too low. Among the figures of a step, those that name a sample come first."""
        invalid = [
            Invalid(name, int(step), float(value), None if sample == NEVER else int(sample))
            for name, (step, value, sample) in self._invalid.items()
            if step != NEVER
        ]
        return min(invalid, key=lambda found: (found.step, found.sample is None), default=None)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON values. This method waits for the GPU."""
        return {"last": self.numbers(), "low": {name: int(count) for name, count in self._low.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self._last = {name: torch.tensor(number) for name, number in state["last"].items()}
        self._low = {name: torch.tensor(float(count)) for name, count in state["low"].items()}
