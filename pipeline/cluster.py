"""The engine on Ray: on one of its own, started in this process, or on the cluster that this process is part of."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.engine import ATTEMPTS, Failure, WorkerShape, retry_or_raise
from pipeline.host import Host, Outcome
from pipeline.nodes import OVERRIDES, needs, version
from stages.base import Progress, StageError

Item = TypeVar("Item")
log = logging.getLogger(__name__)

IN_FLIGHT_GPU = 2
"""Calls under way on one host with a GPU: while it writes one shard it solves the next. Without a GPU the two would
compute side by side, each with threads for all its cores: measured a fifth to a third slower than one by one."""

NOT_INSTALLED = "failed to import on the worker"
"""What Ray says when a node cannot import the module of an actor."""

LOST = Failure("its worker process died (killed, or out of memory)", "the worker process died", final=False)


def _in_flight(shape: WorkerShape) -> int:
    return IN_FLIGHT_GPU if shape.gpus else 1


class RayEngine:
    """A pool of hosts on an embedded local Ray, started when a stage first needs it; or, `attached`, on the cluster
    whose job this process is: their nodes must have this version of Retort, and the cluster outlives the engine."""

    def __init__(self, attached: bool = False) -> None:
        self._attached = attached
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
            for host in self._hosts if self._attached else ():  # at once, so that others get their GPUs
                self._ray.kill(host)
            self._ray.shutdown()
            self._ray, self._hosts = None, []

    def _start(self) -> Any:
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ours = signal.getsignal(signal.SIGTERM)
            self._ray = _attach() if self._attached else _embed()
            signal.signal(signal.SIGTERM, ours)  # Ray puts a plain sys.exit in its place
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
        options = {"num_cpus": 0, "num_gpus": self._shape.gpus, "max_concurrency": _in_flight(self._shape)}
        if self._attached:
            return actor.options(**options, scheduling_strategy="SPREAD").remote(version())
        return actor.options(**options).remote()

    def _replace(self, host: Any) -> Any:
        """A new host in the place of a dead one."""
        new = self._new_host()
        self._hosts[self._hosts.index(host)] = new
        return new

    def _get(self, reference: Any) -> tuple[Outcome, bool]:
        """The outcome, and whether its host was lost. What the host logged goes into our own log."""
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if NOT_INSTALLED in str(error):
                return Outcome(None, _not_installed(str(error)), []), False
            if isinstance(error, self._ray.exceptions.RayTaskError):  # arguments that do not unpickle, say
                return Outcome(None, Failure.of(error), []), False
            return Outcome(None, LOST, []), True  # killed, out of memory, its node gone
        for level, text in outcome.records:
            logging.getLogger("worker").log(level, "%s", text)
        return outcome, False


def _embed() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in OVERRIDES:
        os.environ.pop(name, None)
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
    )
    return ray


def _attach() -> Any:
    """Connect to the cluster that Ray names in the environment of a job. Raises StageError where there is none."""
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise StageError(
            "this process is in no Ray cluster: `--engine attached` is for a job of one, such as "
            "`retort submit MANIFEST --address http://HEAD:8265` makes"
        ) from error
    return ray


def _not_installed(error: str) -> Failure:
    return Failure(f"a node of the cluster cannot import Retort: every node needs {needs()}", error, final=True)
