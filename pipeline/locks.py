"""Locks of the operating system: free the moment their holder dies, and they say who it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import Locked

PATIENCE = 1.0
"""Seconds for which a lock without a holder's name is tried again: somebody only looks at it."""


@contextmanager
def hold(file: Path, what: str, run: str) -> Iterator[None]:
    """Hold `file`'s lock for `run`. Raises Locked, with `what` and the holder, if another process has it."""
    with open(file, "a+", encoding="utf-8") as opened:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                other = holder_of(file)
                if other is not None or time.monotonic() > deadline:
                    who = other or "another process"
                    raise Locked(f"{what} is being made by {who}; wait for it (--wait), or stop it") from None
                time.sleep(0.02)
        opened.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        opened.write(json.dumps({"run": run, "pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        opened.flush()
        try:
            yield
        finally:
            opened.truncate(0)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    run: str
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host}, since {self.since})"


def holder(file: Path) -> Holder | None:
    """Who holds the lock; None if nobody does, or if the holder has not yet written who it is."""
    if not file.exists():
        return None
    with open(file, encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            try:
                return Holder(**json.loads(opened.read()))
            except ValueError:
                return None


def holder_of(file: Path) -> str | None:
    """The same in words."""
    found = holder(file)
    return str(found) if found else None
