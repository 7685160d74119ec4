"""Ray: the only module that imports it.

Workers are generic hosts. A host keeps its process, and with it the slow imports of torch and diffusers,
from stage to stage; it keeps a stage's worker (the loaded teacher) until another stage's is asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.engine import ATTEMPTS, Failure, WorkerShape, retry_or_raise
from stages.base import Progress, StageError

Item = TypeVar("Item")
log = logging.getLogger(__name__)

IN_FLIGHT_GPU = 2
"""Calls under way on one host with a GPU: while it writes one shard it solves the next. Without a GPU the two would
compute side by side, each with threads for all its cores: measured a fifth to a third slower than one by one."""

OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray prefers to an address given in code."""

LOST = Failure("its worker process died (killed, or out of memory)", "the worker process died", final=False)


@dataclass(frozen=True)
class Outcome:
    """What comes back from a host: a value or a failure, and the log lines that went with it."""

    value: Any
    failure: Failure | None
    records: list[tuple[int, str]]


class Host:
    """The actor. Its methods never raise: what goes wrong comes back as a Failure."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._worker: Any = None
        self._making = threading.Lock()
        self._records = _RecordBuffer()
        logging.captureWarnings(True)
        logging.basicConfig(level=logging.INFO, handlers=[self._records], force=True)

    def process(self) -> int:
        return os.getpid()

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


def _in_flight(shape: WorkerShape) -> int:
    return IN_FLIGHT_GPU if shape.gpus else 1


class RayEngine:
    """An embedded local Ray, started when a stage first needs it, and its pool of hosts."""

    def __init__(self) -> None:
        self._ray: Any = None
        self._hosts: list[Any] = []
        self._shape: WorkerShape | None = None

    def map(
        self, key: str, make_worker: Callable[[], Callable[[Item], Any]], items: Iterable[Item], shape: WorkerShape
    ) -> Iterator[tuple[Item, Any]]:
        waiting = [(item, 1) for item in items]
        if not waiting:
            return
        waiting.reverse()  # taken from the end, so that an item tried again comes next
        in_flight = _in_flight(shape)
        places = self._take_hosts(min(shape.workers, len(waiting)), shape)
        maker = self._ray.put(make_worker)
        running: dict[Any, tuple[Item, int, int, Any]] = {}
        load = [0] * len(places)
        while waiting or running:
            # An item that was lost is tried again alone on its host: the next loss is then surely its own.
            while waiting and min(load) < (most := in_flight if waiting[-1][1] == 1 else 1):
                item, attempt = waiting.pop()
                place = load.index(min(load))
                load[place] += in_flight + 1 - most
                running[places[place].call.remote(key, maker, item)] = (item, attempt, place, places[place])
            (reference, *_), _ = self._ray.wait(list(running), num_returns=1)
            item, attempt, place, host = running.pop(reference)
            load[place] -= 1 if attempt == 1 else in_flight
            outcome, lost = self._get(reference)
            if lost and places[place] == host:  # its other call finds it replaced
                places[place] = self._replace(host)
            if outcome.failure is None:
                yield item, outcome.value
            else:
                retry_or_raise(outcome.failure, str(item), attempt)
                waiting.append((item, attempt + 1))

    def run(
        self, function: Callable[..., Generator[Progress, None, Any]], arguments: tuple[Any, ...], shape: WorkerShape
    ) -> Generator[Progress, None, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            (host,) = self._take_hosts(1, shape)
            last: Any = None
            for reference in host.stream.options(num_returns="streaming").remote(function, arguments):
                outcome, lost = self._get(reference)
                if lost:  # the function goes on from what it has left on disk
                    self._replace(host)
                    retry_or_raise(LOST, "the work", attempt)
                    break
                if outcome.failure is not None:
                    log.error("%s", outcome.failure.traceback)
                    raise StageError(outcome.failure.message)
                last = outcome.value
                if isinstance(last, Progress):
                    yield last
            else:
                return last
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()
            self._ray, self._hosts = None, []

    def _start(self) -> Any:
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            for name in OVERRIDES:
                os.environ.pop(name, None)
            import ray

            ours = signal.getsignal(signal.SIGTERM)
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
            )
            signal.signal(signal.SIGTERM, ours)  # Ray puts a plain sys.exit in its place
            self._ray = ray
        return self._ray

    def _take_hosts(self, count: int, shape: WorkerShape) -> list[Any]:
        """Hosts that are there already where their shape fits, new ones for the rest."""
        there = self._start().cluster_resources().get("GPU", 0.0)
        if count * shape.gpus > there:
            raise StageError(
                f"{count} workers with {shape.gpus:g} GPUs each need {count * shape.gpus:g} GPUs; Ray found {there:g}. "
                "Change `resources:` in the manifest"
            )
        if self._shape is not None and self._shape.gpus != shape.gpus:
            for host in self._hosts:
                self._ray.kill(host)
            self._hosts = []
        self._shape = shape
        while len(self._hosts) < count:
            self._hosts.append(self._new_host())
        return self._hosts[:count]

    def _new_host(self) -> Any:
        assert self._shape is not None
        actor = self._ray.remote(Host)
        # num_cpus=0: threads are set by the stage, and a second count by Ray could only keep a worker waiting
        return actor.options(num_cpus=0, num_gpus=self._shape.gpus, max_concurrency=_in_flight(self._shape)).remote()

    def _replace(self, host: Any) -> Any:
        """A new host in the place of a dead one."""
        new = self._new_host()
        self._hosts[self._hosts.index(host)] = new
        return new

    def _get(self, reference: Any) -> tuple[Outcome, bool]:
        """The outcome, and whether its host was lost. What the host logged goes into our own log."""
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # arguments that do not unpickle, say
            return Outcome(None, Failure.of(error), []), False
        except self._ray.exceptions.RayError:  # killed, out of memory, its node gone
            return Outcome(None, LOST, []), True
        for level, text in outcome.records:
            logging.getLogger("worker").log(level, "%s", text)
        return outcome, False
