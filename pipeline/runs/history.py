"""The attempts at each stage of a run, read from its events.

Durations in events come from a monotonic clock. A jump of the system clock changes only the times of day.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class Attempt:
    """One attempt at an artifact, from its start to its end. If its driver was killed, it ends with its last event."""

    workers: int
    spent_before: float
    """Device-seconds of earlier attempts, unless they made the artifact."""
    seconds: float = 0.0
    ended: str | None = None
    """done, failed or interrupted; None while it runs, or if its driver was killed."""
    error: str = ""
    progress: list[Event] = field(default_factory=list)
    """The first and the newest progress event in the current unit."""

    @property
    def device_seconds(self) -> float:
        """Seconds times workers, summed over this attempt and the earlier ones."""
        return self.spent_before + self.seconds * self.workers

    def add(self, event: Event) -> None:
        self.seconds = max(self.seconds, event.get("seconds", 0.0))
        if event["event"] == "progress":
            same = self.progress and self.progress[0]["unit"] == event["unit"]
            self.progress = [self.progress[0], event] if same else [event]
        else:
            self.ended, self.error = event["event"].removeprefix("stage_"), event.get("error", "")

    def rate(self) -> float | None:
        """Units per second, as the stage reports them, or on average since its first progress event."""
        if not self.progress:
            return None
        first, last = self.progress[0], self.progress[-1]
        if "per_second" in last:
            return float(last["per_second"]) or None
        seconds = last.get("seconds", 0.0) - first.get("seconds", 0.0)
        done = last["done"] - first["done"]
        return done / seconds if done > 0 and seconds > 0 else None


def attempts(events: Iterable[Event]) -> dict[tuple[str, str], Attempt]:
    """(stage, fingerprint) -> the latest attempt. Reusing a sealed artifact is not an attempt."""
    found: dict[tuple[str, str], Attempt] = {}
    for event in events:
        key: tuple[str, str] = event["stage"], event.get("fingerprint", "")
        if event["event"] == "stage_started":
            before = found.get(key)
            spent = before.device_seconds if before and before.ended != "done" else 0.0
            found[key] = Attempt(event.get("workers", 1), spent)
        elif key in found and event["event"] != "stage_reused":
            found[key].add(event)
    return found
