"""The actor that engines on Ray make their workers of.

Workers are generic hosts. A host keeps its process, and with it the slow imports of torch and diffusers,
from stage to stage; it keeps a stage's worker (the loaded teacher) until another stage's is asked for.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.engines.engine import Failure
from pipeline.engines.nodes import difference
from stages.base import Progress


@dataclass(frozen=True)
class Outcome:
    """What comes back from a host: a value or a failure, and the log lines that went with it."""

    value: Any
    failure: Failure | None
    records: list[tuple[int, str]]
    lost: bool = False
    """The host itself is gone; so says the driver."""


class Host:
    """Its methods never raise: what goes wrong comes back as a Failure."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._worker: Any = None
        self._making = threading.Lock()
        self._records = _RecordBuffer()
        logging.captureWarnings(True)
        logging.basicConfig(level=logging.INFO, handlers=[self._records], force=True)

    def hello(self, needed: str | None) -> Outcome:
        """Which process on which node this is; a Failure if it runs another build of Retort than `needed`."""
        node = platform.node()
        problem = needed and difference(f"node {node}", "its driver", needed)
        if problem:
            return Outcome(None, Failure(problem, problem, final=True), [])
        return Outcome(f"process {os.getpid()} on node {node}", None, self._records.take())

    def call(self, key: str, make_worker: Callable[[], Callable[[Any], Any]], item: Any) -> Outcome:
        try:
            with self._making:
                if self._key != key:
                    self._worker = self._key = None
                    self._worker, self._key = make_worker(), key
            return Outcome(self._worker(item), None, self._records.take())
        except Exception as error:
            return Outcome(None, Failure.of(error), self._records.take())

    def stream(
        self, function: Callable[..., Generator[Progress, None, Any]], arguments: tuple[Any, ...]
    ) -> Iterator[Outcome]:
        """The function's progress, then its result as the last outcome."""
        self._worker = self._key = None
        steps = function(*arguments)
        try:
            while True:
                yield Outcome(next(steps), None, self._records.take())
        except StopIteration as end:
            yield Outcome(end.value, None, self._records.take())
        except Exception as error:
            yield Outcome(None, Failure.of(error), self._records.take())


class _RecordBuffer(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._taken: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._taken.append((record.levelno, f"[worker {os.getpid()}] {record.getMessage()}"))

    def take(self) -> list[tuple[int, str]]:
        taken, self._taken = self._taken, []
        return taken
