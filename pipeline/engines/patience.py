"""How long a call to a worker may take: what is slow is named, what is stuck is given up."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

log = logging.getLogger(__name__)

HOUR = 3600.0


@dataclass(frozen=True)
class Limit:
    """`times` the median of the calls that have finished, and at least `least` seconds; `first` before any has."""

    times: float
    least: float
    first: float

    def seconds(self, finished: Iterable[float]) -> float:
        taken = list(finished)
        return max(self.least, self.times * median(taken)) if taken else self.first


SLOW = Limit(times=10, least=60.0, first=600.0)
"""A call that takes longer is named in the log."""

STUCK = Limit(times=100, least=HOUR, first=48 * HOUR)
"""A call that takes longer is given up, and its worker replaced."""

REMEMBERED = 1000
"""Finished calls that the median is taken of: the latest."""


@dataclass(eq=False)
class Call:
    """Work under way on one worker."""

    what: str
    worker: Any
    where: str
    """Its process and node."""
    started: float = field(default_factory=time.monotonic)
    named: bool = False
    given_up: str = ""
    """Why nobody waits for it any more, in words."""


class Watch:
    """Looks at the calls of one stage. Of calls that are not `alike`, such as the steps of a function, which may pause
    between them, one that takes far longer than the others is no sign that it is stuck."""

    def __init__(self, alike: bool = True) -> None:
        self._alike = alike
        self._finished: deque[float] = deque(maxlen=REMEMBERED)

    def finished(self, call: Call) -> None:
        self._finished.append(time.monotonic() - call.started)

    def look(self, calls: Iterable[Call]) -> list[Call]:
        """Name in the log what has become slow; return what is now given up."""
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
