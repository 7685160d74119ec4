"""Times steps of the training loop, and the bare network passes of these steps, in turn on one machine."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.training import Method, TrainingExecution
from stages.training.loop import train

SHIPPED = Path(__file__).parents[2] / "stages" / "teacher" / "shipped" / "digit_scenes"
STEPS = 10
"""The number of steps in a round: those between two lines of the history of the loop."""


def compare(method: Method, batch: Mapping[str, Any], bare: Callable[[int], None], rounds: int) -> None:
    """Print the seconds per step of both, and their ratio, as medians over rounds of STEPS steps. The first round is
    not counted, so `method` needs settings for `rounds + 1` rounds. `bare(step)` makes the passes of a step, 0 to STEPS
    - 1."""
    execution = TrainingExecution(device="cpu", checkpoint_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        loop = train(method, lambda _: batch, seed=0, checkpoints=Path(folder), execution=execution)
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            next(loop)
            between = time.perf_counter()
            for step in range(STEPS):
                bare(step)
            times.append(((between - started) / STEPS, (time.perf_counter() - between) / STEPS))
    full, passes = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median(a / b for a, b in times[1:])
    print(f"full step {full:.3f} s, bare passes {passes:.3f} s, ratio {ratio:.3f}")
