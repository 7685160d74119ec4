"""File locks of the operating system. A lock is released when its holder's process ends. Its file names the holder."""

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

RETRY_UNNAMED_FOR = 1.0
"""Seconds for which `hold` retries a lock whose file names no holder. The function `holder` takes it briefly."""

WAIT_EVERY = 1.0
"""Seconds between two attempts to take a lock."""


@contextmanager
def hold(file: Path, what: str, run: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the exclusive lock of `file` in the name of `run`. The file is created if it does not exist.

    If another process has the lock and `waiting` is None, Locked is raised. Otherwise `waiting` is called once, with
    the reason, and the call waits for the lock. The reason is `what`, then "by" and the holder. `what` is a clause such
    as "run digits is being carried out".
    """
    with ExitStack() as stack:
        deadline, told = time.monotonic() + RETRY_UNNAMED_FOR, False
        opened = stack.enter_context(_open(file))
        while not _locked(opened, fcntl.LOCK_EX) or not _is_at(opened, file):
            if not _is_at(opened, file):  # the last holder removed the file: lock the new one
                opened = stack.enter_context(_open(file))
                continue
            other = holder(file)
            if other is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            text = f"{what} by {other or 'another process'}"
            if waiting is None:
                raise Locked(f"{text}; wait for it (--wait), or stop it (retort stop)")
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
    """Hold the shared lock of `file`. Wait while another process holds the exclusive lock."""
    with open(file, "a+", encoding="utf-8") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        yield


def _open(file: Path) -> IO[str]:
    file.parent.mkdir(exist_ok=True)
    return open(file, "a+", encoding="utf-8")


def _is_at(opened: IO[str], file: Path) -> bool:
    """Whether `opened` is still the file at the path `file`."""
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
    """The process that holds a lock, and its run. `since` is a UTC time in ISO 8601."""

    run: str
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"run {self.run} (process {self.pid} on {self.host}, since {self.since})"


def holder(file: Path) -> Holder | None:
    """Return the holder of the exclusive lock of `file`; None if it is free, or if no name is in the file yet."""
    if not file.exists():
        return None
    with open(file, encoding="utf-8") as opened:
        if _locked(opened, fcntl.LOCK_SH):
            return None
        try:
            return Holder(**json.loads(opened.read()))
        except ValueError:
            return None
