"""Follow a run: its status as it changes, its logs and events as they grow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from pipeline.runs import Run

EVERY = 1.0
"""Seconds between two checks of the run."""


def watch(run: Run, draw: Callable[[], str]) -> None:
    """Show `draw()` until the run ends, whenever it changes. On a terminal it is redrawn in place."""
    from rich.live import Live
    from rich.text import Text

    screen = Live(auto_refresh=False, vertical_overflow="visible") if sys.stdout.isatty() else None
    with screen or nullcontext():
        shown, alive = "", True
        while alive:
            alive = run.driver() is not None
            text = draw()
            if screen:
                screen.update(Text(text), refresh=True)
            elif text != shown:
                print(text, flush=True)
            shown = text
            time.sleep(EVERY if alive else 0.0)


def lines(file: Path, run: Run, follow: bool) -> Iterator[str]:
    """Yield the complete lines of a file. The file may not exist yet. With `follow`, go on until the run ends."""
    offset = 0
    while True:
        alive = follow and run.driver()  # asked before reading, so that the last lines are read too
        if file.exists():
            with open(file, "rb") as opened:
                opened.seek(offset)
                for line in opened:
                    if alive and not line.endswith(b"\n"):
                        break  # the rest is being written
                    offset += len(line)
                    yield line.decode("utf-8", "replace").rstrip("\n")
        if not alive:
            return
        time.sleep(EVERY)
