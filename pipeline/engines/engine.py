"""Engines carry out what a stage asks for. The inline engine does it in this process; Ray's is in cluster.py."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from stages.base import Progress, StageError

Item = TypeVar("Item")
log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often an item is tried, and how often in a row a function is without new progress, before the stage fails."""

FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
"""Errors of the file system that trying again will not mend."""


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker, in a form that travels: exceptions of other packages may not."""

    message: str
    traceback: str
    final: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        final = isinstance(error, StageError) or (isinstance(error, OSError) and error.errno in FINAL_ERRNOS)
        return cls(describe(error), "".join(traceback.format_exception(error)), final)


def describe(error: BaseException) -> str:
    """An error as one sentence for a user."""
    if isinstance(error, StageError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}: free some space, then resume; nothing half-written counts"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class WorkerShape:
    """How many workers, and what each gets."""

    workers: int
    gpus: float


Make = Callable[[], Callable[[Item], Any]]
Function = Callable[..., Generator[Progress, None, Any]]

Say = Callable[[str], None]
"""Tells who follows a run what its stage is waiting for."""


class Engine(Protocol):
    """Both methods raise StageError when an item, or the function, failed for good."""

    def map(
        self, key: str, make_worker: Make[Item], items: Iterable[Item], shape: WorkerShape, say: Say = log.warning
    ) -> Iterator[tuple[Item, Any]]:
        """As StageContext.map. `key` tells workers made for one stage from those of another."""

    def run(
        self, function: Function, arguments: tuple[Any, ...], shape: WorkerShape, say: Say = log.warning
    ) -> Generator[Progress, None, Any]:
        """Yield the function's progress, return its result."""

    def close(self) -> None:
        """Let all workers go. What they were doing is abandoned."""


def retry_or_raise(failure: Failure, what: str, attempt: int) -> None:
    """Return if the item is to be tried again, else raise StageError that names it."""
    log.error("%s, attempt %d of %d: %s", what, attempt, ATTEMPTS, failure.traceback)
    if failure.final:
        raise StageError(f"{what}: {failure.message}")
    if attempt >= ATTEMPTS:
        raise StageError(f"{what} failed {ATTEMPTS} times, the last time with: {failure.message}")
