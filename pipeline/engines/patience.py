"""Time limits of calls to workers: slow calls are logged, stuck calls are given up."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

log = logging.getLogger(__name__)

HOUR = 3600.0


@dataclass(frozen=True)
class Limit:
    """A time limit in seconds: `times` the median of the finished calls, but at least `least`. Before any call has
    finished, the limit is `first`."""

    times: float
    least: float
    first: float

    def seconds(self, finished: Collection[float]) -> float:
        """The limit, given the seconds of the finished calls."""
        return max(self.least, self.times * median(finished)) if finished else self.first


SLOW = Limit(times=10, least=60.0, first=600.0)
"""A call that takes longer is logged."""

STUCK = Limit(times=100, least=HOUR, first=48 * HOUR)
"""A call that takes longer is given up, and its worker is replaced."""

REMEMBERED = 1000
"""The median is taken over this many of the latest finished calls."""


@dataclass(eq=False)
class Call:
    """A call under way on a worker."""

    what: str
    worker: Any
    where: str
    """The process and node of the worker."""
    started: float = field(default_factory=time.monotonic)
    named: bool = False
    """Whether it has been logged as slow."""
    given_up: str = ""
    """Why the call was given up, in words; empty while the driver waits for it."""


class Watch:
    """Watches the calls of one stage.

    `alike`: whether all calls should take about equally long. If so, a stuck call is found by the median of the others.
    The steps of a function are not alike: it may pause between two of them. A stuck step is given up after 48 hours.
    """

    def __init__(self, alike: bool = True) -> None:
        self._alike = alike
        self._finished: deque[float] = deque(maxlen=REMEMBERED)

    def finished(self, call: Call) -> None:
        self._finished.append(time.monotonic() - call.started)

    def look(self, calls: Iterable[Call]) -> list[Call]:
        """Log calls that have become slow. Return the calls that are given up now."""
        now, stuck = time.monotonic(), []
        slow_after = SLOW.seconds(self._finished)
        stuck_after = STUCK.seconds(self._finished if self._alike else ())
        for call in calls:
            taken = now - call.started
            if taken > stuck_after and not call.given_up:
                call.given_up = f"given up after {taken:.0f} s without an answer from {call.where}"
                log.error("%s: %s", call.what, call.given_up)
                stuck.append(call)
            elif taken > slow_after and not call.named:
                call.named = True
                usual = f" (the median is {median(self._finished):.1f} s)" if self._finished else ""
                log.warning("%s: no answer for %.0f s%s from %s", call.what, taken, usual, call.where)
        return stuck
