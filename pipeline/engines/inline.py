"""The engine without Ray."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from pipeline.engines.engine import ATTEMPTS, Failure, Function, Item, Make, Say, WorkerShape, retry_or_raise
from stages.base import Progress

log = logging.getLogger(__name__)


class InlineEngine:
    """Runs everything in this process, one item after another. It is for debugging, and for machines without Ray."""

    def map(
        self, key: str, make_worker: Make[Item], items: Iterable[Item], shape: WorkerShape, say: Say = log.warning
    ) -> Iterator[tuple[Item, Any]]:
        worker = None
        for item in items:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    worker = worker or make_worker()
                    result = worker(item)
                except Exception as error:
                    retry_or_raise(Failure.of(error), str(item), attempt)
                else:
                    yield item, result
                    break

    def run(
        self, function: Function, arguments: tuple[Any, ...], shape: WorkerShape, say: Say = log.warning
    ) -> Generator[Progress, None, Any]:
        try:
            return (yield from function(*arguments))
        except Exception as error:
            Failure.of(error).fail()

    def close(self) -> None:
        pass
