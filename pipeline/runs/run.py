"""The folder of a run: what was asked for, what was planned, what happened.

STORE/runs/NAME/manifest.yaml   the resolved manifest: defaults and overrides written out, paths absolute
STORE/runs/NAME/plan.json       the plan, frozen when the run was submitted or resumed
STORE/runs/NAME/events.jsonl    one JSON object a line: time, event, stage and more
STORE/runs/NAME/logs/STAGE.log
STORE/runs/NAME/lock            locked by the process that carries the run out
STORE/runs/NAME/job.json        the latest job of a Ray cluster; see jobs/job.py
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import Locked, UsageError, suggest
from pipeline.manifest import Loaded, Manifest, dump, load
from pipeline.manifest.model import NAME
from pipeline.planning import Plan
from pipeline.store import Store, hold, holder
from pipeline.store.artifacts import lineage
from pipeline.store.locks import Holder
from stages.base import Artifact
from stages.data.files import write_atomically

PLAN_KEYS = {"kind", "fingerprint", "pool", "reads", "inputs", "files", "identity"}
"""The keys of each stage in a frozen plan that later commands need."""

REPAIR_PREFIX = "repair-"
"""The prefix of the names of runs that repair an artifact."""


def all_runs(store: Store) -> list[Run]:
    """The runs of the store that have a plan, sorted by name."""
    names = sorted(path.parent.name for path in store.root.glob("runs/*/plan.json"))
    return [Run(store, name) for name in names if re.fullmatch(NAME, name)]


class Run:
    """A run by its name. Its folder may not exist yet. Raises UsageError for an invalid name."""

    def __init__(self, store: Store, name: str) -> None:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"{name!r} is not a valid name for a run: use at most 80 letters, digits, - or _")
        self.store, self.name, self.folder = store, name, store.root / "runs" / name

    @classmethod
    def find(cls, store: Store, name: str | None) -> Run:
        """The run of that name; without a name, the only run of the store.

        Raises UsageError, with a list of the runs, if there is no such run."""
        names = [run.name for run in all_runs(store)]
        without_repairs = [one for one in names if not one.startswith(REPAIR_PREFIX)]
        if name is None and len(without_repairs) == 1:
            name = without_repairs[0]
        if name is None or name not in names:
            asked = f"no run {name!r}" if name else "give the name of a run"
            close = suggest(name or "", names).partition(" (")[0]
            there = f"which has: {', '.join(names)}" if names else "which has none; `retort submit MANIFEST` makes one"
            raise UsageError(f"{asked} in store {store.root}, {there}{close}")
        return cls(store, name)

    def held(self, waiting: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
        """Hold the lock of this run, so that no other process carries it out. Raises Locked or waits, like `hold`."""
        return hold(self.folder / "lock", f"run {self.name} is being carried out", self.name, waiting)

    @contextmanager
    def making(self, artifact: Artifact, pool: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the locks of an artifact and its pool, so that no other process makes the artifact or parts in the pool.
        Raises Locked or waits, like `hold`."""
        with ExitStack() as stack:
            for fingerprint in dict.fromkeys((artifact.fingerprint, pool.name)):
                file = self.store.lock_of(artifact.kind, fingerprint)
                stack.enter_context(hold(file, f"{artifact.kind}/{fingerprint} is being made", self.name, waiting))
            yield

    def driver(self) -> Holder | None:
        """The process that carries out the run now."""
        return holder(self.folder / "lock")

    def uses(self) -> set[Path]:
        """The folders that the run needs: the artifacts of its plan, their pools, their unfinished work, and everything
        that those artifacts were made from. Raises UsageError for a plan or a record that cannot be read."""
        used: set[Path] = set()
        for stage in self.plan().values():
            kind, fingerprint = stage["kind"], stage["fingerprint"]
            used |= {self.store.pool(kind, stage["pool"]), self.store.root / "work" / f"{kind}-{fingerprint}"}
            for folder in (self.store.folder(kind, fingerprint), *map(Path, stage["inputs"].values())):
                used |= set(lineage(folder))
        return {path.resolve() for path in used}

    def check_not_in_use(self, artifact: Artifact, pool: Path, what: str) -> None:
        """Raise Locked if another run that is being carried out makes or reads the artifact or its pool. `what` names
        it in the message."""
        for other in all_runs(self.store):
            under_way = other.name != self.name and other.driver()
            if under_way and {artifact.folder.resolve(), pool.resolve()} & other.uses():
                raise Locked(f"{what} is in use by run {other.name}; wait until it ends, or stop it (retort stop)")

    def freeze(self, resolved: Manifest, plan: Plan) -> None:
        """Write the manifest and the plan. A run that is submitted again gets new ones."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "manifest.yaml", dump(resolved).encode("utf-8"))
        stages = {stage.name: stage.as_dict() for stage in plan}
        write_atomically(self.folder / "plan.json", json.dumps(stages, indent=2).encode("utf-8"))

    def manifest(self, overrides: Sequence[str] = ()) -> Loaded:
        """The resolved manifest, with `overrides` (PATH=VALUE). Its store is the one that holds the run,
        because stores may be moved."""
        store = f"store={json.dumps(str(self.store.root), ensure_ascii=False)}"
        return load(self.folder / "manifest.yaml", [*overrides, store])

    def plan(self) -> dict[str, dict[str, Any]]:
        """stage -> its frozen plan; empty if there is none yet. Raises UsageError for a plan that cannot be read."""
        file = self.folder / "plan.json"
        try:
            plan: dict[str, dict[str, Any]] = json.loads(file.read_bytes())
            if all(stage.keys() >= PLAN_KEYS for stage in plan.values()):
                return plan
            why = "another version of Retort wrote it"
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            why = str(error)
        resume = f"retort resume {self.name} --store {self.store.root}"
        raise UsageError(f"{file} cannot be read ({why}); make a new plan with: {resume}")

    def previous(self) -> dict[str, dict[str, Any]]:
        """Like `plan`, but empty for a plan that cannot be read. New plans are compared with it."""
        try:
            return self.plan()
        except UsageError:
            return {}

    def log_file(self, stage: str) -> Path:
        return self.folder / "logs" / f"{stage}.log"

    def event(self, event: str, stage: str | None = None, **details: Any) -> None:
        """Append one event in a single write, so that lines of two processes do not mix. If a crash cut off the last
        line, a line break comes first."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, "stage": stage, **details}) + "\n"
        with open(self.folder / "events.jsonl", "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = "\n" + line
            file.write(line.encode())

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield the events in order. Lines that cannot be read are skipped."""
        try:
            with open(self.folder / "events.jsonl", "rb") as file:
                yield from filter(None, map(read_event, file))
        except FileNotFoundError:
            return


def read_event(line: bytes | str) -> dict[str, Any] | None:
    """Parse one line of events.jsonl. None if the line is damaged or is not an event."""
    try:
        event = json.loads(line)
        wanted = {"time", "event", "stage"}
        wanted |= {"fingerprint", "done", "total", "unit"} if event.get("event") == "progress" else set()
        return event if wanted <= event.keys() else None
    except (ValueError, AttributeError):
        return None
