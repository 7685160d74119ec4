"""The runner: carries out a plan. It locks, runs and seals one stage after another, and records events and logs."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline.engines import Engine, WorkerShape, describe
from pipeline.errors import StageFailed
from pipeline.manifest import Manifest
from pipeline.manifest.fields import plain
from pipeline.manifest.model import Resources
from pipeline.planning import Plan, PlannedStage
from pipeline.planning.content import HashCache, identify
from pipeline.runs.history import attempts
from pipeline.runs.run import Run
from pipeline.store import RECORD
from pipeline.store.artifacts import damaged_input
from stages.base import Artifact, Progress, StageError
from stages.data.provenance import versions
from stages.data.urls import redacted

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

EVENT_EVERY = 5.0
"""Seconds between two progress events of a stage."""


class Reporter:
    """Receives the progress of stages, and notes such as "done in 3 s". It prints nothing; its subclasses in
    `pipeline.views.progress` do."""

    def progress(self, stage: str, progress: Progress) -> None: ...
    def note(self, stage: str, text: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class Runner:
    """Carries out the plan of one run. With `wait` it waits for locks of other runs."""

    run: Run
    manifest: Manifest
    engine: Engine
    reporter: Reporter
    wait: bool = False

    def execute(self, plan: Plan, chosen: Collection[str]) -> None:
        """Make the `chosen` stages as `plan` says.

        Raises StageFailed, Locked or KeyboardInterrupt. The run can be resumed after each of them.
        """
        self.run.event("run_started", pid=os.getpid(), stages=[s.name for s in plan if s.name in chosen])
        for stage in plan:
            if stage.name in chosen:
                self._stage(stage)
        self.run.event("run_done")

    def _stage(self, stage: PlannedStage) -> None:
        store = self.run.store

        def waiting(text: str) -> None:
            self.reporter.note(stage.name, f"waiting: {text}")

        with self.run.making(stage.artifact, stage.pool, waiting if self.wait else None):
            # checked again under the lock: another run may have made the artifact since the plan was made
            damage = store.damage(stage.artifact)
            if damage is None:
                self.reporter.note(stage.name, "reused")
                self._event("stage_reused", stage)
                return
            store.unseal(stage.artifact)  # if sealed, it is damaged: hide it from readers until it is made again
            state, why = ("run", damage) if damage and stage.state == "reuse" else (stage.state, stage.why)
            self.reporter.note(stage.name, f"{state}: {why}")
            workers = self.manifest.resources_of(stage.name).workers
            self._event("stage_started", stage, why=why, workers=workers)
            started = time.monotonic()
            with _log_to(self.run.log_file(stage.name)):
                log.info("%s: %s", state, why)
                try:
                    self._make(stage, started)
                    log.info("done in %.0f s: %s", _since(started), stage.artifact.folder)
                except KeyboardInterrupt:
                    self._event("stage_interrupted", stage, seconds=_since(started))
                    raise
                except Exception as error:
                    log.exception("the stage failed")
                    why = redacted(describe(error))
                    with suppress(OSError):  # on a full disk events fail too; the message below still says why
                        self._event("stage_failed", stage, seconds=_since(started), error=why)
                    raise StageFailed(
                        f"stage {stage.name} failed: {why}\n"
                        f"log: {self.run.log_file(stage.name)}\n"
                        f"carry on with: retort resume {self.run.name} --store {store.root}"
                    ) from error
            self.reporter.note(stage.name, f"done in {_since(started):.0f} s")
            self._event("stage_done", stage, seconds=_since(started))

    def _event(self, event: str, stage: PlannedStage, **details: Any) -> None:
        self.run.event(event, stage.name, fingerprint=stage.artifact.fingerprint, **details)

    def _make(self, stage: PlannedStage, started: float) -> None:
        store, artifact = self.run.store, stage.artifact
        since = datetime.now(UTC)
        if store.outdated(artifact):
            log.info("the files of an earlier attempt are dropped: they were made from inputs with different bytes")
            store.drop_work(artifact)
        if (store.work(artifact) / RECORD).exists():  # killed after the record was written, before the folder was moved
            store.finish(artifact.folder, store.work(artifact))
            if store.damage(artifact) is None:
                return
            store.unseal(artifact)
        inputs_sha256 = self._check_inputs(stage)
        work = store.begin(artifact, inputs_sha256)
        resources = self.manifest.resources_of(stage.name)
        context = Context(self, stage, work, resources, started)
        self._check_contents(stage)
        metrics = dict(artifact.stage.run(context))
        self._check_contents(stage)
        attempt = attempts(self.run.events()).get((stage.name, artifact.fingerprint))
        spent_before = attempt.spent_before if attempt else 0.0  # there is none if the events were removed
        record = {
            "kind": artifact.kind,
            "fingerprint": artifact.fingerprint,
            "settings": plain(artifact.stage),
            "seed": artifact.seed,
            "inputs": {f: os.path.relpath(a.folder, artifact.folder) for f, a in artifact.inputs.items()},
            "inputs_sha256": inputs_sha256,
            "pool": stage.pool.name if stage.pool.exists() else None,
            "identity": stage.identity,
            "made_by": {"run": self.run.name, "host": platform.node(), "started": since.isoformat(timespec="seconds")},
            "resources": resources.model_dump(),
            "threads": context.threads,
            "device": metrics.pop("device", "cpu"),
            "seconds": _since(started),
            "device_seconds": round(spent_before + _since(started) * resources.workers, 3),
            "versions": versions(),
            "commit": _commit(),
            "metrics": metrics,
        }
        store.seal(artifact, work, record)

    def _check_inputs(self, stage: PlannedStage) -> dict[str, str]:
        """Check the hashes of all inputs, and return input field -> sha256. Files that have not changed are hashed once
        only.

        Raises StageError for a file that differs from what was sealed.
        """
        cache = HashCache(self.run.store.hashes)
        try:
            if damage := damaged_input(stage.artifact, cache.sha256_of):
                raise StageError(damage)
        finally:
            cache.save()
        return {field: artifact.sha256 for field, artifact in stage.artifact.inputs.items()}

    def _check_contents(self, stage: PlannedStage) -> None:
        """Raise StageError if an outside file changed since the plan: the fingerprint depends on the old content."""
        files = {field: value for field, value in stage.contents.items() if value.startswith("sha256:")}
        now = identify(stage.artifact.stage, HashCache(self.run.store.hashes)) if files else {}
        for field, value in files.items():
            if now[field] != value:
                remedy = "resume the run to plan with the new content"
                raise StageError(f"{stage.files[field]} changed since the run was planned; {remedy}")


class Context:
    """Implements the StageContext of stages/base.py on top of a runner."""

    def __init__(self, runner: Runner, stage: PlannedStage, work: Path, resources: Resources, started: float) -> None:
        self._runner, self._stage, self._started = runner, stage, started
        self._shape = WorkerShape(resources.workers, resources.gpus_per_worker)
        self._last_event = 0.0
        self.inputs: Mapping[str, Artifact] = stage.artifact.inputs
        self.fingerprint = stage.artifact.fingerprint
        self.seed = stage.artifact.seed
        self.contents = stage.contents
        self.output = work
        self.pool = stage.pool
        self.threads = stage.artifact.stage.execution.threads or max(1, (os.cpu_count() or 1) // resources.workers)

    def map(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        return self._runner.engine.map(self.fingerprint, make_worker, items, self._shape, self._say)

    def run(self, function: Callable[..., Generator[Progress, None, Result]], *arguments: Any) -> Result:
        steps = self._runner.engine.run(function, arguments, self._shape, self._say)
        while True:
            try:
                self.progress(next(steps))
            except StopIteration as end:
                result: Result = end.value
                return result

    def progress(self, progress: Progress) -> None:
        self._runner.reporter.progress(self._stage.name, progress)
        now = time.monotonic()
        if now - self._last_event >= EVENT_EVERY or progress.done == progress.total:
            self._last_event = now
            self._runner.run.event(
                "progress",
                self._stage.name,
                fingerprint=self.fingerprint,
                done=progress.done,
                total=progress.total,
                unit=progress.unit,
                seconds=_since(self._started),
                **progress.figures,
            )

    def _say(self, text: str) -> None:
        log.warning("%s", text)
        self._runner.reporter.note(self._stage.name, text)
        self._runner.run.event("stage_waits", self._stage.name, why=text)

    def warn(self, text: str) -> None:
        log.warning("%s", text)
        self._runner.reporter.note(self._stage.name, f"warning: {text}")


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


class _StageLog(logging.FileHandler):
    def format(self, record: logging.LogRecord) -> str:
        """Remove passwords and signatures from URLs, because logs are shown to others."""
        return redacted(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a log line that cannot be written, as on a full disk: no traceback is printed."""


@contextmanager
def _log_to(file: Path) -> Iterator[None]:
    """Send all log records and warnings of this process to `file`, and none to the terminal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _StageLog(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _commit() -> str | None:
    """The git commit of the checkout that Retort runs from; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
    )
    return found.stdout.strip() or None
