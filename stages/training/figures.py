"""The figures (scalars) that training logs, and the detection of invalid ones.

Values stay on the GPU until they are read, so that training steps need not wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_LOSS = 1e6
"""A loss with a larger magnitude counts as diverged. All of Retort's losses are averages of order one."""
NEVER = -1
"""The step of a figure that was never invalid."""


class Figures:
    """Keeps the last value and the first invalid value of each figure. A step may omit figures."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._invalid: dict[str, tuple[Tensor, Tensor]] = {}
        """Name -> (first step at which the figure was invalid, or NEVER; value at that step)."""

    def add(self, figures: Mapping[str, Tensor], step: int) -> None:
        """Add the figures of one step. All are scalars. This method does not wait for the GPU."""
        for name, value in figures.items():
            self._last[name] = value
            since, was = self._invalid.get(name, (torch.full_like(value, NEVER), value))
            valid = value.isfinite() & (value.abs() <= MAX_LOSS) if name.endswith("loss") else value.isfinite()
            now = (since == NEVER) & ~valid
            self._invalid[name] = torch.where(now, step, since), torch.where(now, value, was)

    def numbers(self) -> dict[str, float]:
        """Return the last value of each figure. This method waits for the GPU."""
        return {name: float(value) for name, value in self._last.items()}

    def first_invalid(self) -> tuple[str, int, float] | None:
        """Return (name, step, value) of the first invalid figure, or None if all figures were valid.

        A figure is invalid if it is not finite. A loss is also invalid if its magnitude is above MAX_LOSS."""
        invalid = [(int(since), name, float(was)) for name, (since, was) in self._invalid.items() if since != NEVER]
        if not invalid:
            return None
        step, name, value = min(invalid, key=lambda found: found[0])  # within a step: the one computed first
        return name, step, value

    def restore(self, numbers: Mapping[str, float]) -> None:
        """Set the last values to those of a checkpoint."""
        self._last = {name: torch.tensor(number) for name, number in numbers.items()}
