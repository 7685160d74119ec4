"""The protocol of engines, and how failures are described and retried. The engines are in inline.py and ray.py."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from stages.base import Progress, StageError

Item = TypeVar("Item")
log = logging.getLogger(__name__)

ATTEMPTS = 3
"""A stage fails after this many attempts at one item, or after this many runs of a function in a row without
progress."""

FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
"""Errors of the file system that are not retried, because a retry would fail too."""


@dataclass(frozen=True)
class Failure:
    """An error in a worker, as text. Exceptions of other packages may not unpickle in this process.

    `final`: a retry would fail too.
    """

    message: str
    traceback: str
    final: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        final = isinstance(error, StageError) or (isinstance(error, OSError) and error.errno in FINAL_ERRNOS)
        return cls(describe(error), "".join(traceback.format_exception(error)), final)

    def fail(self) -> NoReturn:
        """Log the failure, and raise it as a StageError."""
        log.error("%s", self.traceback)
        raise StageError(self.message)


def describe(error: BaseException) -> str:
    """Describe an error to a user, in one sentence where possible."""
    if isinstance(error, StageError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return f"the disk is full{where}: free some space, then resume; half-written files are ignored"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class WorkerShape:
    """The number of workers, and the GPUs of each. Below 1, workers share a GPU."""

    workers: int
    gpus: float


Make = Callable[[], Callable[[Item], Any]]
Function = Callable[..., Generator[Progress, None, Any]]

Say = Callable[[str], None]
"""Tells the user what a stage is waiting for."""


class Engine(Protocol):
    """Runs the work of stages. `map` and `run` raise StageError when an item, or the function, has failed for good."""

    def map(
        self, key: str, make_worker: Make[Item], items: Iterable[Item], shape: WorkerShape, say: Say = log.warning
    ) -> Iterator[tuple[Item, Any]]:
        """Yield (item, result) of every item, in the order of completion, as StageContext.map does.

        `key` identifies the stage: a worker made for one key is not used for another.
        """

    def run(
        self, function: Function, arguments: tuple[Any, ...], shape: WorkerShape, say: Say = log.warning
    ) -> Generator[Progress, None, Any]:
        """Yield the progress of `function(*arguments)`, and return its result."""

    def close(self) -> None:
        """Release all workers. Calls under way are abandoned."""


def retry_or_raise(failure: Failure, what: str, attempt: int) -> None:
    """Log the failure of `what`. Return if it is to be tried again; otherwise raise StageError."""
    log.error("%s, attempt %d of %d: %s", what, attempt, ATTEMPTS, failure.traceback)
    if failure.final:
        raise StageError(f"{what}: {failure.message}")
    if attempt >= ATTEMPTS:
        raise StageError(f"{what} failed {ATTEMPTS} times, the last time with: {failure.message}")
