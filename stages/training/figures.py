"""What training logs: figures as last computed, and which of them went wrong first. Nothing waits for the GPU until
numbers are asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXPLODED = 1e6
"""A loss above this is no use any more: all of Retort's are averages, of order one."""
NEVER = -1


class Figures:
    """By name, in the order in which they are computed; a step need not give each of them."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._wrong: dict[str, tuple[Tensor, Tensor]] = {}
        """The step at which a figure first went wrong, or NEVER, and what it was then."""

    def add(self, figures: Mapping[str, Tensor], step: int) -> None:
        """Those of one step: scalars."""
        for name, value in figures.items():
            self._last[name] = value
            since, was = self._wrong.get(name, (torch.full_like(value, NEVER), value))
            good = value.isfinite() & (value.abs() <= EXPLODED) if name.endswith("loss") else value.isfinite()
            now = (since == NEVER) & ~good
            self._wrong[name] = torch.where(now, step, since), torch.where(now, value, was)

    def numbers(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._last.items()}

    def first_wrong(self) -> tuple[str, int, float] | None:
        """The name, the step and the value of the first that was not finite, or a loss out of all proportion."""
        wrong = [(int(since), name, float(was)) for name, (since, was) in self._wrong.items() if since != NEVER]
        if not wrong:
            return None
        step, name, value = min(wrong, key=lambda found: found[0])  # of one step, the one that was computed first
        return name, step, value

    def restore(self, numbers: Mapping[str, float]) -> None:
        self._last = {name: torch.tensor(number) for name, number in numbers.items()}
