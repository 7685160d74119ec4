"""Locks of the operating system: free the moment their holder dies, and they say who it is."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipeline.errors import Locked

PATIENCE = 1.0
"""Seconds for which a lock without a holder's name is tried again: somebody only looks at it."""

WAIT_EVERY = 1.0
"""Seconds between two tries of a lock that is waited for."""


@contextmanager
def hold(file: Path, what: str, run: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `file`'s lock for `run`; the file is made if it is not there. If another process has the lock: without
    `waiting` raises Locked, with `what` and the holder; with it, calls it once with that text and waits."""
    with ExitStack() as stack:
        deadline, told = time.monotonic() + PATIENCE, False
        opened = stack.enter_context(_open(file))
        while not _locked(opened, fcntl.LOCK_EX) or not _is_at(opened, file):
            if not _is_at(opened, file):  # removed by the last holder: its lock means nothing any more
                opened = stack.enter_context(_open(file))
                continue
            other = holder(file)
            if other is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            text = f"{what} is being made by {other or 'another process'}"
            if waiting is None:
                raise Locked(f"{text}; wait for it (--wait), or stop it")
            if not told:
                waiting(text)
                told = True
            time.sleep(WAIT_EVERY)
        opened.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        opened.write(json.dumps({"run": run, "pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        opened.flush()
        try:
            yield
        finally:
            opened.truncate(0)


@contextmanager
def share(file: Path) -> Iterator[None]:
    """Hold `file`'s lock together with all others who share it; wait while somebody holds it alone."""
    with open(file, "a+", encoding="utf-8") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        yield


def _open(file: Path) -> IO[str]:
    file.parent.mkdir(exist_ok=True)
    return open(file, "a+", encoding="utf-8")


def _is_at(opened: IO[str], file: Path) -> bool:
    """Whether `file` is still the one that was opened."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _locked(opened: IO[str], how: int) -> bool:
    try:
        fcntl.flock(opened, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
        if _locked(opened, fcntl.LOCK_SH):
            return None
        try:
            return Holder(**json.loads(opened.read()))
        except ValueError:
            return None
