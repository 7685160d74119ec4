"""The engine on Ray: on a local Ray that it starts, or on the cluster that this process is a job of."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.engines.engine import Failure, Function, Item, Make, Say, WorkerShape, retry_or_raise
from pipeline.engines.nodes import OVERRIDES, build, needs
from pipeline.engines.patience import HOUR, Call, Watch
from pipeline.engines.worker import Host, Outcome
from stages.base import Progress, StageError

log = logging.getLogger(__name__)

IN_FLIGHT_GPU = 2
"""Maximum number of calls under way on a host with a GPU: it solves the next shard while it writes one.

Hosts without a GPU get one call at a time. Two calls at once would each use threads for all cores,
which we measured to be a fifth to a third slower than one call after the other.
"""

NOT_INSTALLED = "failed to import on the worker"
"""Part of Ray's message when a node cannot import the module of an actor."""

LOOK_EVERY = 5.0
"""Maximum seconds between two checks of the pending workers and of the calls under way."""

PENDING_AFTER = 30.0
"""Seconds after which a worker that has not answered is reported.

It is also the pause before the same report is repeated. That pause doubles each time.
"""

START_WITHIN = HOUR / 2
"""Seconds that a stage waits while none of its workers answers. An autoscaler takes minutes to add a node with GPUs."""

FETCH_WITHIN = 300.0
"""Seconds for a finished result to arrive from its node."""

TOKEN = secrets.token_hex(32)
"""The token of this process's Ray. It reaches Ray's processes only through the environment: no file or argument holds
it."""

LOST = Failure("its worker process died (killed, or out of memory)", "the worker process died", final=False)


def _in_flight(shape: WorkerShape) -> int:
    return IN_FLIGHT_GPU if shape.gpus else 1


@dataclass(eq=False)
class Worker:
    """A slot for an actor. It gets work once the actor has answered. A lost actor is replaced."""

    actor: Any
    answer: Any
    """The Ray reference of the actor's first answer."""
    asked: float = field(default_factory=time.monotonic)
    where: str = ""
    """The process and node of the actor; empty until it answers."""
    load: int = 0
    """Calls under way; a call that uses the worker alone counts as its whole capacity."""


class RayEngine:
    """Keeps a pool of worker processes, from stage to stage.

    By default they run on a local Ray that is started when a stage first needs it. If `attached`, they run on the
    cluster that this process is a job of. Its nodes must have this build of Retort. The cluster outlives the engine.
    """

    def __init__(self, attached: bool = False) -> None:
        self.attached = attached
        self._ray: Any = None
        self._workers: list[Worker] = []
        self._shape = WorkerShape(0, 0.0)

    def map(
        self, key: str, make_worker: Make[Item], items: Iterable[Item], shape: WorkerShape, say: Say = log.warning
    ) -> Iterator[tuple[Item, Any]]:
        waiting = [(item, 1) for item in items]
        if not waiting:
            return
        waiting.reverse()  # items are taken from the end, so that a retried item comes next
        in_flight = _in_flight(shape)
        workers = _StageWorkers(self, min(shape.workers, len(waiting)), shape, say, Watch())
        maker = self._ray.put(make_worker)
        running: dict[Any, tuple[Item, int, Call]] = {}
        while waiting or running:
            # A lost item is retried alone on its worker: if the worker is lost again, the item is the cause.
            while waiting and (worker := workers.free(in_flight - _weight(waiting[-1][1], in_flight))):
                item, attempt = waiting.pop()
                worker.load += _weight(attempt, in_flight)
                reference = worker.actor.call.remote(key, maker, item)
                running[reference] = item, attempt, Call(str(item), worker, worker.where)
            reference = workers.wait([*running], [call for _, _, call in running.values()])
            if reference is None:
                continue
            item, attempt, call = running.pop(reference)
            call.worker.load -= _weight(attempt, in_flight)
            outcome = workers.outcome(reference, call)
            if outcome.failure is None:
                yield item, outcome.value
            else:
                retry_or_raise(outcome.failure, str(item), attempt)
                waiting.append((item, attempt + 1))

    def run(
        self, function: Function, arguments: tuple[Any, ...], shape: WorkerShape, say: Say = log.warning
    ) -> Generator[Progress, None, Any]:
        workers = _StageWorkers(self, 1, shape, say, Watch(alike=False))
        furthest: dict[str, int] = {}
        lost_in_a_row, what = 0, "the work"
        while True:
            while (worker := workers.free(0)) is None:
                workers.wait([])
            stream = worker.actor.stream.options(num_returns="streaming").remote(function, arguments)
            last: Any = None
            while True:
                call = Call("the work", worker, worker.where)
                while workers.wait([stream], [call]) is None:
                    continue
                try:
                    outcome = workers.outcome(next(stream), call)
                except StopIteration:
                    return last
                if outcome.failure is None:
                    last = outcome.value
                    if isinstance(last, Progress):
                        if last.done > furthest.get(last.unit, -1):
                            furthest[last.unit], lost_in_a_row = last.done, 0
                            what = f"the work at {last.done} of {last.total} {last.unit}"
                        yield last
                elif outcome.lost:
                    lost_in_a_row += 1
                    retry_or_raise(outcome.failure, what, lost_in_a_row)
                    break  # the function continues from its files on disk
                else:
                    outcome.failure.fail()

    def close(self) -> None:
        if self._ray is not None:
            for worker in self._workers if self.attached else ():  # frees their GPUs at once
                self._ray.kill(worker.actor)
            self._ray.shutdown()
            self._ray, self._workers = None, []

    def start(self) -> Any:
        """Return Ray; start or attach to it first if needed."""
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            handler = signal.getsignal(signal.SIGTERM)
            self._ray = _attach() if self.attached else _embed()
            signal.signal(signal.SIGTERM, handler)  # Ray replaces it by one that calls sys.exit
        return self._ray

    def acquire(self, count: int, shape: WorkerShape) -> list[Worker]:
        """Return `count` workers of this shape. Existing workers are reused if their GPUs fit; new ones are requested
        otherwise."""
        if self._shape.gpus != shape.gpus:
            for worker in self._workers:
                self._ray.kill(worker.actor)
            self._workers = []
        self._shape = shape
        self._workers.sort(key=lambda worker: not worker.where)
        while len(self._workers) < count:
            self._workers.append(Worker(*self._new_actor()))
        for worker in self._workers:
            worker.load = 0
        return self._workers[:count]

    def replace(self, worker: Worker) -> None:
        """Give a worker that is lost or out of reach a new actor."""
        self._ray.kill(worker.actor)
        worker.actor, worker.answer = self._new_actor()
        worker.asked, worker.where = time.monotonic(), ""

    def _new_actor(self) -> tuple[Any, Any]:
        """Request an actor. Return it and the reference of its first answer."""
        host = self._ray.remote(Host).options(
            num_cpus=0,  # the stage sets the threads; Ray's own count of CPUs could only delay a worker
            num_gpus=self._shape.gpus,
            max_concurrency=_in_flight(self._shape),
            scheduling_strategy="SPREAD" if self.attached else "DEFAULT",
        )
        actor = host.remote()
        return actor, actor.identify.remote(build() if self.attached else None)

    def get(self, reference: Any) -> Outcome:
        """Fetch an outcome. The host's log records are added to the log of this process."""
        try:
            outcome: Outcome = self._ray.get(reference, timeout=FETCH_WITHIN)
        except self._ray.exceptions.RayError as error:
            if NOT_INSTALLED in str(error):
                problem = f"a node of the cluster cannot import Retort: every node needs {needs()}"
                return Outcome(None, Failure(problem, str(error), final=True))
            if isinstance(error, self._ray.exceptions.RayTaskError):  # such as arguments that do not unpickle
                return Outcome(None, Failure.of(error))
            return Outcome(None, LOST, lost=True)  # killed, out of memory, or on a node that is gone
        for level, text in outcome.records:
            logging.getLogger("worker").log(level, "%s", text)
        return outcome


def _weight(attempt: int, in_flight: int) -> int:
    """How much of a worker's capacity a call uses. A retried call uses all of it."""
    return 1 if attempt == 1 else in_flight


class _StageWorkers:
    """The workers of one stage. Workers that have answered get calls; the others are waited for and reported."""

    def __init__(self, engine: RayEngine, count: int, shape: WorkerShape, say: Say, watch: Watch) -> None:
        self._engine, self._ray, self._shape, self._say = engine, engine.start(), shape, say
        self._check_room(count)
        self._workers = engine.acquire(count, shape)
        self._watch = watch
        self._failed_starts = 0
        self._idle_since = time.monotonic()
        self._said, self._repeat_at, self._pause = "", 0.0, PENDING_AFTER

    def free(self, most: int) -> Worker | None:
        """The least loaded worker that has answered and has at most `most` calls under way; None if there is none."""
        candidates = [worker for worker in self._workers if worker.where and worker.load <= most]
        return min(candidates, key=lambda worker: worker.load, default=None)

    def wait(self, references: list[Any], calls: Iterable[Call] = ()) -> Any:
        """Wait for the first of `references`, which belong to `calls`, to be ready, and return it.

        Returns None if none is ready after LOOK_EVERY seconds, or if a worker answered first. Raises StageError if no
        worker starts within START_WITHIN seconds.
        """
        answers = {worker.answer: worker for worker in self._workers if not worker.where}
        ready, _ = self._ray.wait([*answers, *references], num_returns=1, timeout=LOOK_EVERY)
        answered = [answers[reference] for reference in ready if reference in answers]
        for worker in answered:
            self._handle_answer(worker)
        self._look_at_workers()
        for stuck in self._watch.look(calls):
            if stuck.where == stuck.worker.where:
                self._ray.kill(stuck.worker.actor)  # its calls then return as lost
        return ready[0] if ready and not answered else None

    def outcome(self, reference: Any, call: Call) -> Outcome:
        """Fetch the outcome of a finished call. If its worker was lost, it is replaced."""
        outcome = self._engine.get(reference)
        if not outcome.lost:
            self._watch.finished(call)
            return outcome
        if call.where == call.worker.where:  # a second call of the lost actor finds it replaced already
            self._engine.replace(call.worker)
        return replace(outcome, failure=replace(LOST, message=call.given_up)) if call.given_up else outcome

    def _handle_answer(self, worker: Worker) -> None:
        outcome = self._engine.get(worker.answer)
        if outcome.lost:
            self._failed_starts += 1
            retry_or_raise(LOST, "the start of a worker", self._failed_starts)
            self._engine.replace(worker)
        elif outcome.failure is not None:
            outcome.failure.fail()
        else:
            self._failed_starts = 0
            worker.where = outcome.value
            log.info("worker %d of %d: %s", self._workers.index(worker) + 1, len(self._workers), worker.where)

    def _look_at_workers(self) -> None:
        """Report the workers that are waited for. Raises StageError if none has answered for START_WITHIN seconds."""
        now = time.monotonic()
        late = [n for n, w in enumerate(self._workers, 1) if not w.where and now - w.asked > PENDING_AFTER]
        working = sum(bool(worker.where) for worker in self._workers)
        if working:
            self._idle_since = now
        elif now - self._idle_since > START_WITHIN:
            raise StageError(f"no worker started within {START_WITHIN:.0f} s: {self._room()}")
        text = _waiting(late, len(self._workers), working, self._shape.gpus) if late else ""
        if text and (text != self._said or now > self._repeat_at):
            self._pause = 2 * self._pause if text == self._said else PENDING_AFTER
            self._repeat_at = now + self._pause
            self._say(text)
        self._said = text

    def _check_room(self, count: int) -> None:
        """Raise StageError if the workers can never all start. On a cluster, only report it: nodes may be added."""
        if not self._shape.gpus or count <= fitting(self._gpus(), self._shape.gpus):
            return
        problem = f"{count} workers with {self._shape.gpus:g} GPUs each do not fit: {self._room()}"
        if not self._engine.attached:
            raise StageError(problem)
        self._say(problem)

    def _room(self) -> str:
        """Say how many workers fit, and what to change."""
        if not self._shape.gpus:
            return "see Ray's log files in /tmp/ray/session_latest/logs"
        nodes = self._gpus()
        found = " + ".join(f"{gpus:g}" for gpus in nodes if gpus) or "no"
        return (
            f"Ray found {found} GPUs, enough for {fitting(nodes, self._shape.gpus)} (the GPUs of a worker are all on "
            "one node, and a fraction is part of a single GPU); change `workers` or `gpus_per_worker` under "
            "`resources:` in the manifest"
        )

    def _gpus(self) -> list[float]:
        """GPUs of each node that is alive."""
        return [node["Resources"].get("GPU", 0.0) for node in self._ray.nodes() if node["Alive"]]


def fitting(nodes: Iterable[float], gpus: float) -> int:
    """How many workers with `gpus` GPUs each fit on these nodes, given the GPUs of each node.

    The GPUs of a worker are all on one node. A fraction is part of a single GPU.
    """
    if gpus >= 1:
        return sum(int(node // gpus) for node in nodes)
    return sum(int(node) for node in nodes) * math.floor(1 / gpus + 1e-9)


def _waiting(late: list[int], count: int, working: int, gpus: float) -> str:
    """The report about late workers: `worker 3 of 3 is waiting for 0.6 GPU; 2 are working`."""
    what = f"{gpus:g} GPU" if gpus else "a process"
    if len(late) == 1:
        who = f"worker {late[0]} of {count} is waiting for {what}"
    else:
        who = f"workers {', '.join(map(str, late))} of {count} are waiting for {what} each"
    return f"{who}; {working or 'none'} {'is' if working == 1 else 'are'} working"


def _embed() -> Any:
    """Start a local Ray that only this process and its workers can use.

    It requires a token that is made for this process alone. All its servers, as listed by `ss -ltnp`, listen on the
    loopback address. Ray chooses this address where clusters are disabled, as by default on a Mac. Ray reads the
    variables below when it is imported, and keeps the token until the process ends.

    Workers have the priority of this process. Ray's default, a nice value of 15, would let every other process take
    their cores.
    """
    for name in OVERRIDES:
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        import ray

        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
        )
        return ray
    finally:  # later processes do not get them
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _attach() -> Any:
    """Connect to the cluster of this job, which Ray finds in the environment. Raises StageError if there is none."""
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise StageError(
            "this process is not in a Ray cluster, so `--engine attached` has no workers; to run on a cluster use "
            "`retort submit MANIFEST --address http://HEAD:8265`"
        ) from error
    return ray
