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
    """One attempt at a stage, from its start to its end. If its driver was killed, it ends with its last event."""

    fingerprint: str
    workers: int = 1
    seconds: float = 0.0
    ended: str | None = None
    """done, failed or interrupted; None while it runs, or if its driver was killed."""
    error: str = ""
    progress: list[Event] = field(default_factory=list)
    """The first and the newest progress event in the current unit."""

    @property
    def device_seconds(self) -> float:
        return self.seconds * self.workers

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


def attempts(events: Iterable[Event]) -> dict[str, list[Attempt]]:
    """stage -> its attempts, the newest last. Reusing a sealed artifact is not an attempt."""
    found: dict[str, list[Attempt]] = {}
    for event in events:
        stage, fingerprint = event["stage"], event.get("fingerprint")
        if not stage or not fingerprint or event["event"] == "stage_reused":
            continue
        if event["event"] == "stage_started":
            found.setdefault(stage, []).append(Attempt(fingerprint, event.get("workers", 1)))
        elif stage in found and found[stage][-1].fingerprint == fingerprint:
            found[stage][-1].add(event)
    return found


def spent(tried: Iterable[Attempt], fingerprint: str) -> float:
    """Device-seconds of the attempts that led to the latest artifact with this fingerprint, failed ones included."""
    seconds, made = 0.0, False
    for attempt in tried:
        if attempt.fingerprint == fingerprint:
            seconds = attempt.device_seconds if made else seconds + attempt.device_seconds
            made = attempt.ended == "done"
    return seconds
