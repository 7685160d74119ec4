"""Follow a run: its status as it changes, its logs and events as they grow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.runs import Run

EVERY = 1.0
"""Seconds between two checks of the run."""


def watch(run: Run, draw: Callable[[], str]) -> None:
    """Show `draw()` until the run ends. On a terminal it is redrawn in place. Elsewhere it is printed whenever it
    changes."""
    if sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(Text(draw()), auto_refresh=False, vertical_overflow="visible") as live:
            while run.driver():
                time.sleep(EVERY)
                live.update(Text(draw()), refresh=True)
        return
    shown = ""
    while True:
        alive = run.driver()
        if (text := draw()) != shown:
            print(text, flush=True)
            shown = text
        if not alive:
            return
        time.sleep(EVERY)


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
