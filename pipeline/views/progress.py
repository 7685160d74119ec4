"""Show a run under way: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from pipeline.runs import Reporter
from stages.base import Progress

PLAIN_EVERY = 10.0
"""Seconds between two plain lines of one stage."""


def reporter(quiet: bool = False) -> Reporter:
    """The reporter for standard error: Quiet, or Live on a terminal, or else Plain."""
    if quiet:
        return Quiet()
    return Live() if sys.stderr.isatty() else Plain()


class Quiet:
    """Prints nothing. It is used with --json and for quiet runs."""

    def started(self, stage: str, why: str) -> None: ...
    def progress(self, stage: str, progress: Progress) -> None: ...
    def note(self, stage: str, text: str) -> None: ...
    def ended(self, stage: str, how: str) -> None: ...
    def close(self) -> None: ...


class Plain:
    """Prints lines to standard error."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def started(self, stage: str, why: str) -> None:
        self._line(stage, why)
        self._last[stage] = time.monotonic()

    def progress(self, stage: str, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last.get(stage, 0.0) >= PLAIN_EVERY:
            self._last[stage] = now
            self._line(stage, describe(progress))

    def note(self, stage: str, text: str) -> None:
        self._line(stage, text)

    def ended(self, stage: str, how: str) -> None:
        self._line(stage, how)

    def close(self) -> None: ...

    def _line(self, stage: str, text: str) -> None:
        print(f"{stage}: {text}", file=sys.stderr, flush=True)


class Live:
    """Draws progress bars on the terminal, one for each stage and unit."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, dict[str, Any]] = {}
        self._bars.start()

    def started(self, stage: str, why: str) -> None:
        self.note(stage, why)
        self._tasks[stage] = {}

    def progress(self, stage: str, progress: Progress) -> None:
        """Update a bar. There is one bar for each unit that the stage counts, such as VAE steps and U-Net steps."""
        tasks = self._tasks.setdefault(stage, {})
        if progress.unit not in tasks:
            tasks[progress.unit] = self._bars.add_task("", stage=stage, total=progress.total)
        self._bars.update(
            tasks[progress.unit],
            completed=progress.done,
            total=progress.total,
            description=describe(progress),
        )

    def note(self, stage: str, text: str) -> None:
        self._bars.console.print(f"{stage}: {text}", markup=False, highlight=False)

    def ended(self, stage: str, how: str) -> None:
        self.note(stage, how)

    def close(self) -> None:
        self._bars.stop()


def describe(progress: Progress) -> str:
    """Progress in one line: `320/1280 pairs, 21.3/s, loss 0.12`."""
    parts = [f"{progress.done}/{progress.total} {progress.unit}"]
    rate = progress.figures.get("per_second")
    if rate is not None:
        parts.append(f"{rate:.3g}/s")
    parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in _shown(progress.figures)]
    return ", ".join(parts)


def _shown(figures: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(n, v) for n, v in figures.items() if n not in ("per_second", "step", "gradient_norm")]
