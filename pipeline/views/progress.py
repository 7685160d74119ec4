"""Show a run under way: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from pipeline.runs import Reporter
from stages.base import Progress

PLAIN_EVERY = 10.0
"""Minimum seconds between a line of a stage and its next line about progress."""

HIDDEN = ("per_second", "step", "gradient_norm")
"""Figures that are not shown as `name value`."""


def reporter(quiet: bool = False) -> Reporter:
    """The reporter for standard error: Live on a terminal, else Plain; one that prints nothing if `quiet`."""
    if quiet:
        return Reporter()
    return Live() if sys.stderr.isatty() else Plain()


class Plain(Reporter):
    """Prints lines to standard error."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def progress(self, stage: str, progress: Progress) -> None:
        if time.monotonic() - self._last.get(stage, 0.0) >= PLAIN_EVERY:
            self.note(stage, describe(progress))

    def note(self, stage: str, text: str) -> None:
        self._last[stage] = time.monotonic()
        print(f"{stage}: {text}", file=sys.stderr, flush=True)


class Live(Reporter):
    """Draws progress bars on the terminal, one for each stage and unit."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[tuple[str, str], Any] = {}
        self._bars.start()

    def progress(self, stage: str, progress: Progress) -> None:
        """Update a bar. There is one bar for each unit that the stage counts, such as VAE steps and U-Net steps."""
        key = stage, progress.unit
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task("", stage=stage)
        bar, words = self._tasks[key], describe(progress)
        self._bars.update(bar, completed=progress.done, total=progress.total, description=words)

    def note(self, stage: str, text: str) -> None:
        self._bars.console.print(f"{stage}: {text}", markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()


def describe(progress: Progress) -> str:
    """Progress in one line: `320/1280 pairs, 21.3/s, loss 0.12`."""
    parts, figures = [f"{progress.done}/{progress.total} {progress.unit}"], progress.figures
    parts += [f"{figures['per_second']:.3g}/s"] if "per_second" in figures else []
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items() if name not in HIDDEN]
    return ", ".join(parts)
