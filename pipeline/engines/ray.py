"""The engine on Ray: on one of its own, started in this process, or on the cluster that this process is part of."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from pipeline.engines.engine import Failure, Function, Make, Say, WorkerShape, retry_or_raise
from pipeline.engines.nodes import OVERRIDES, build, needs
from pipeline.engines.patience import HOUR, Call, Watch
from pipeline.engines.worker import Host, Outcome
from stages.base import Progress, StageError

Item = TypeVar("Item")
log = logging.getLogger(__name__)

IN_FLIGHT_GPU = 2
"""Calls under way on one host with a GPU: while it writes one shard it solves the next. Without a GPU the two would
compute side by side, each with threads for all its cores: measured a fifth to a third slower than one by one."""

NOT_INSTALLED = "failed to import on the worker"
"""What Ray says when a node cannot import the module of an actor."""

LOOK_EVERY = 5.0
"""Seconds, at most, between two looks at workers that are waited for and at calls under way."""

PENDING_AFTER = 30.0
"""Seconds after which a worker that has not answered is named, and between two times that the same is said: the
latter are doubled each time."""

START_WITHIN = HOUR / 2
"""Seconds that a stage waits while none of its workers answers: an autoscaler's node with GPUs takes minutes."""

FETCH_WITHIN = 300.0
"""Seconds for an answer that is there to come from its node."""

LOST = Failure("its worker process died (killed, or out of memory)", "the worker process died", final=False)


def _in_flight(shape: WorkerShape) -> int:
    return IN_FLIGHT_GPU if shape.gpus else 1


@dataclass(eq=False)
class Worker:
    """An actor that was asked for. It gets work once it has answered."""

    actor: Any
    answer: Any
    """The reference of its first answer."""
    asked: float = field(default_factory=time.monotonic)
    where: str = ""
    """Its process and node; empty until it answers."""
    load: int = 0


class RayEngine:
    """A pool of hosts on an embedded local Ray, started when a stage first needs it; or, `attached`, on the cluster
    whose job this process is: their nodes must have this build of Retort, and the cluster outlives the engine."""

    def __init__(self, attached: bool = False) -> None:
        self.attached = attached
        self._ray: Any = None
        self._workers: list[Worker] = []
        self._shape: WorkerShape | None = None

    def map(
        self, key: str, make_worker: Make[Item], items: Iterable[Item], shape: WorkerShape, say: Say = log.warning
    ) -> Iterator[tuple[Item, Any]]:
        waiting = [(item, 1) for item in items]
        if not waiting:
            return
        waiting.reverse()  # taken from the end, so that an item tried again comes next
        in_flight = _in_flight(shape)
        staff = _Staff(self, min(shape.workers, len(waiting)), shape, say, Watch())
        maker = self._ray.put(make_worker)
        running: dict[Any, tuple[Item, int, Call]] = {}
        while waiting or running:
            # An item that was lost is tried again alone on its worker: the next loss is then surely its own.
            while waiting and (worker := staff.free(in_flight - _weight(waiting[-1][1], in_flight))):
                item, attempt = waiting.pop()
                worker.load += _weight(attempt, in_flight)
                reference = worker.actor.call.remote(key, maker, item)
                running[reference] = item, attempt, Call(str(item), worker, worker.where)
            reference = staff.wait([*running], [call for _, _, call in running.values()])
            if reference is None:
                continue
            item, attempt, call = running.pop(reference)
            call.worker.load -= _weight(attempt, in_flight)
            outcome = staff.outcome(reference, call)
            if outcome.failure is None:
                yield item, outcome.value
            else:
                retry_or_raise(outcome.failure, str(item), attempt)
                waiting.append((item, attempt + 1))

    def run(
        self, function: Function, arguments: tuple[Any, ...], shape: WorkerShape, say: Say = log.warning
    ) -> Generator[Progress, None, Any]:
        staff = _Staff(self, 1, shape, say, Watch(alike=False))
        furthest: dict[str, int] = {}
        losses, place = 0, "the work"
        while True:
            last: Any = None
            for outcome in staff.stream(function, arguments):
                if outcome.failure is not None:
                    if not outcome.lost:
                        log.error("%s", outcome.failure.traceback)
                        raise StageError(outcome.failure.message)
                    losses += 1
                    retry_or_raise(outcome.failure, place, losses)
                    break  # the function goes on from what it has left on disk
                last = outcome.value
                if isinstance(last, Progress):
                    if last.done > furthest.get(last.unit, -1):
                        furthest[last.unit], losses = last.done, 0
                        place = f"the work at {last.done} of {last.total} {last.unit}"
                    yield last
            else:
                return last

    def close(self) -> None:
        if self._ray is not None:
            for worker in self._workers if self.attached else ():  # at once, so that others get their GPUs
                self._ray.kill(worker.actor)
            self._ray.shutdown()
            self._ray, self._workers = None, []

    def start(self) -> Any:
        """Ray, started when it is first asked for."""
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ours = signal.getsignal(signal.SIGTERM)
            self._ray = _attach() if self.attached else _embed()
            signal.signal(signal.SIGTERM, ours)  # Ray puts a plain sys.exit in its place
        return self._ray

    def hire(self, count: int, shape: WorkerShape) -> list[Worker]:
        """Workers that are there already where their shape fits, new ones for the rest."""
        self.start()
        if self._shape is not None and self._shape.gpus != shape.gpus:
            for worker in self._workers:
                self._ray.kill(worker.actor)
            self._workers = []
        self._shape = shape
        self._workers.sort(key=lambda worker: not worker.where)
        while len(self._workers) < count:
            self._workers.append(self._new_worker())
        for worker in self._workers:
            worker.load = 0
        return self._workers[:count]

    def replace(self, worker: Worker) -> Worker:
        """A new worker in the place of one that is lost, or out of reach."""
        self._ray.kill(worker.actor)
        new = self._new_worker()
        self._workers[self._workers.index(worker)] = new
        return new

    def _new_worker(self) -> Worker:
        assert self._shape is not None
        # num_cpus=0: threads are set by the stage, and a second count by Ray could only keep a worker waiting
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": self._shape.gpus,
            "max_concurrency": _in_flight(self._shape),
        }
        if self.attached:
            options["scheduling_strategy"] = "SPREAD"
        actor = self._ray.remote(Host).options(**options).remote()
        return Worker(actor, actor.hello.remote(build() if self.attached else None))

    def get(self, reference: Any) -> Outcome:
        """The outcome. What the host logged goes into our own log."""
        try:
            outcome: Outcome = self._ray.get(reference, timeout=FETCH_WITHIN)
        except self._ray.exceptions.RayError as error:
            if NOT_INSTALLED in str(error):
                return Outcome(None, _not_installed(str(error)), [])
            if isinstance(error, self._ray.exceptions.RayTaskError):  # arguments that do not unpickle, say
                return Outcome(None, Failure.of(error), [])
            return Outcome(None, LOST, [], lost=True)  # killed, out of memory, its node gone
        for level, text in outcome.records:
            logging.getLogger("worker").log(level, "%s", text)
        return outcome


def _weight(attempt: int, in_flight: int) -> int:
    """How much of a worker a call takes up."""
    return 1 if attempt == 1 else in_flight


class _Staff:
    """The workers of one stage. Those that have answered work; the others are waited for, and named."""

    def __init__(self, engine: RayEngine, count: int, shape: WorkerShape, say: Say, watch: Watch) -> None:
        self._engine, self._ray, self._shape, self._say = engine, engine.start(), shape, say
        self._check_room(count)
        self._workers = engine.hire(count, shape)
        self._watch = watch
        self._failed_starts = 0
        self._idle_since = time.monotonic()
        self._said, self._said_at, self._pause = "", 0.0, PENDING_AFTER

    def free(self, most: int) -> Worker | None:
        """The least loaded of those that have answered, if it has `most` calls under way."""
        there = [worker for worker in self._workers if worker.where and worker.load <= most]
        return min(there, key=lambda worker: worker.load, default=None)

    def wait(self, references: list[Any], calls: Iterable[Call] = ()) -> Any:
        """Whichever of `references`, of `calls` under way, is ready first; None if there is nothing yet, or if a
        worker answered first. Raises StageError if no worker starts."""
        answers = {worker.answer: worker for worker in self._workers if not worker.where}
        ready, _ = self._ray.wait([*answers, *references], num_returns=1, timeout=LOOK_EVERY)
        answered = [answers[reference] for reference in ready if reference in answers]
        for worker in answered:
            self._welcome(worker)
        self._look_at_workers()
        for stuck in self._watch.look(calls):
            self._ray.kill(stuck.worker.actor)  # its calls come back as lost
        return ready[0] if ready and not answered else None

    def outcome(self, reference: Any, call: Call) -> Outcome:
        """That of a call that came back. A worker that was lost is replaced."""
        outcome = self._engine.get(reference)
        if not outcome.lost:
            self._watch.finished(call)
            return outcome
        if call.worker in self._workers:  # its other call finds it replaced
            self._replace(call.worker)
        return replace(outcome, failure=replace(LOST, message=call.given_up)) if call.given_up else outcome

    def stream(self, function: Function, arguments: tuple[Any, ...]) -> Iterator[Outcome]:
        """What a function yields on one worker, and its result last; or, last, that the worker was lost."""
        while (worker := self.free(0)) is None:
            self.wait([])
        stream = worker.actor.stream.options(num_returns="streaming").remote(function, arguments)
        call = Call("the work", worker, worker.where)
        while True:
            if self.wait([stream], [call]) is None:
                continue
            try:
                outcome = self.outcome(next(stream), call)
            except StopIteration:
                return
            yield outcome
            if outcome.lost:
                return
            call = Call("the work", worker, worker.where)

    def _welcome(self, worker: Worker) -> None:
        outcome = self._engine.get(worker.answer)
        if outcome.lost:
            self._failed_starts += 1
            retry_or_raise(LOST, "the start of a worker", self._failed_starts)
            self._replace(worker)
        elif outcome.failure is not None:
            log.error("%s", outcome.failure.traceback)
            raise StageError(outcome.failure.message)
        else:
            self._failed_starts = 0
            worker.where = outcome.value
            log.info("worker %d of %d: %s", self._workers.index(worker) + 1, len(self._workers), worker.where)

    def _replace(self, worker: Worker) -> None:
        self._workers[self._workers.index(worker)] = self._engine.replace(worker)

    def _look_at_workers(self) -> None:
        """Say which workers are waited for. Raises StageError if that has been all of them for too long."""
        now = time.monotonic()
        late = [n for n, w in enumerate(self._workers, 1) if not w.where and now - w.asked > PENDING_AFTER]
        pending = sum(not worker.where for worker in self._workers)
        working = len(self._workers) - pending
        if working:
            self._idle_since = now
        elif now - self._idle_since > START_WITHIN:
            raise StageError(f"no worker started within {START_WITHIN:.0f} s: {self._room()}")
        text = _waiting(late, len(self._workers), working, self._shape.gpus) if late else ""
        if text == self._said and (not text or now - self._said_at < self._pause):
            return
        self._pause = 2 * self._pause if text == self._said else PENDING_AFTER
        self._said, self._said_at = text, now
        if text:
            self._say(text)

    def _check_room(self, count: int) -> None:
        """Raise StageError if not all can ever start; on a cluster, where an autoscaler may add nodes, say so."""
        if not self._shape.gpus or count <= fitting(self._gpus(), self._shape.gpus):
            return
        problem = f"{count} workers with {self._shape.gpus:g} GPUs each do not fit: {self._room()}"
        if not self._engine.attached:
            raise StageError(problem)
        self._say(problem)

    def _room(self) -> str:
        """How many workers fit, and what to change."""
        if not self._shape.gpus:
            return "what Ray logged in its session folder (/tmp/ray/session_latest/logs) says more"
        fit, nodes = fitting(self._gpus(), self._shape.gpus), [f"{gpus:g}" for gpus in self._gpus() if gpus]
        found = f"nodes with {', '.join(nodes)} GPUs" if len(nodes) > 1 else f"{''.join(nodes) or 0} GPUs"
        return (
            f"Ray found {found}, enough for {fit} (a worker's GPUs are all of one node, a part of a GPU is of one "
            "GPU); change `workers` or `gpus_per_worker` under `resources:` in the manifest"
        )

    def _gpus(self) -> list[float]:
        """Of each node that is alive."""
        return [node["Resources"].get("GPU", 0.0) for node in self._ray.nodes() if node["Alive"]]


def fitting(nodes: Iterable[float], gpus: float) -> int:
    """How many workers with `gpus` GPUs each fit on nodes with so many: whole ones of one node, a part of one."""
    if gpus >= 1:
        return sum(int(node // gpus) for node in nodes)
    return sum(int(node) for node in nodes) * math.floor(1 / gpus + 1e-9)


def _waiting(late: list[int], count: int, working: int, gpus: float) -> str:
    """`worker 3 of 3 is waiting for 0.6 GPU; 2 work`."""
    what = f"{gpus:g} GPU" if gpus else "a process"
    if len(late) == 1:
        who = f"worker {late[0]} of {count} is waiting for {what}"
    else:
        who = f"workers {', '.join(map(str, late))} of {count} are waiting for {what} each"
    return f"{who}; {working or 'none'} work{'s' if working == 1 else ''}"


def _embed() -> Any:
    """Start a Ray that only this process and its workers can use.

    It asks for a token that was made for this process alone. All its servers, as `ss -ltnp` lists them, listen on the
    loopback address, which Ray chooses where clusters are off, as they are by default on a Mac. Ray reads these
    variables as it is imported, and keeps the token to the end of the process.
    """
    for name in OVERRIDES:
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_token(), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):
        import ray

        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
        )
    return ray


@cache
def _token() -> str:
    """Of this process. It reaches Ray's processes by the environment alone: by no file, and by no argument."""
    return secrets.token_hex(32)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables, and set them back: they are nobody's who is started later."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
