"""The host: the Ray actor that serves as a worker process.

A host is not bound to a stage. Its process, with the slow imports of torch and diffusers, is kept from stage to stage.
It keeps the worker object of one stage, such as a loaded teacher, until another stage needs the host.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engines.engine import Failure
from pipeline.engines.nodes import build_difference
from stages.base import Progress


@dataclass(frozen=True)
class Outcome:
    """What a host returns: a value or a failure, with the log records (level, text) of the call."""

    value: Any
    failure: Failure | None = None
    records: Sequence[tuple[int, str]] = ()
    lost: bool = False
    """Whether the host itself is gone. The driver sets this."""


class Host:
    """Its methods never raise an exception. An error is returned as a Failure."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._worker: Any = None
        self._making = threading.Lock()
        self._records = _RecordBuffer()
        logging.captureWarnings(True)
        logging.basicConfig(level=logging.INFO, handlers=[self._records], force=True)

    def identify(self, needed: str | None) -> Outcome:
        """Return the process and node of this host. If its build of Retort is not `needed`, return a Failure.
        `needed` is None if any build will do."""
        node = platform.node()
        problem = needed and build_difference(f"node {node}", "its driver", needed)
        if problem:
            return self._outcome(failure=Failure(problem, problem, final=True))
        return self._outcome(f"process {os.getpid()} on node {node}")

    def call(self, key: str, make_worker: Callable[[], Callable[[Any], Any]], item: Any) -> Outcome:
        """Return the result of a stage's worker for `item`. A worker that was made for another `key` is replaced
        first."""
        try:
            with self._making:
                if self._key != key:
                    self._worker = self._key = None
                    self._worker, self._key = make_worker(), key
            return self._outcome(self._worker(item))
        except Exception as error:
            return self._outcome(failure=Failure.of(error))

    def stream(
        self, function: Callable[..., Generator[Progress, None, Any]], arguments: tuple[Any, ...]
    ) -> Iterator[Outcome]:
        """Yield the progress of the function, then its result as the last outcome."""
        self._worker = self._key = None
        steps = function(*arguments)
        try:
            while True:
                yield self._outcome(next(steps))
        except StopIteration as end:
            yield self._outcome(end.value)
        except Exception as error:
            yield self._outcome(failure=Failure.of(error))

    def _outcome(self, value: Any = None, failure: Failure | None = None) -> Outcome:
        """An outcome with the log records that were made since the last one."""
        return Outcome(value, failure, self._records.take())


class _RecordBuffer(logging.Handler):
    """Keeps log records as text: records themselves may hold objects that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, f"[worker {os.getpid()}] {record.getMessage()}"))

    def take(self) -> list[tuple[int, str]]:
        taken, self._kept = self._kept, []
        return taken
