"""A run's folder: what was asked, what was planned, what happened.

STORE/runs/NAME/manifest.yaml   resolved: defaults and overrides written out, paths absolute
STORE/runs/NAME/plan.json       frozen when the run was submitted
STORE/runs/NAME/events.jsonl    a JSON object a line: time, event, stage, ...
STORE/runs/NAME/logs/STAGE.log
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

PLANNED = {"kind", "fingerprint", "pool", "reads", "inputs", "files", "identity"}
"""What a frozen plan says of each stage."""

REPAIR = "repair-"
"""Names of runs that mend an artifact begin like this."""


def all_runs(store: Store) -> list[Run]:
    """Those that were planned, by name."""
    names = sorted(path.parent.name for path in store.root.glob("runs/*/plan.json"))
    return [Run(store, name) for name in names if re.fullmatch(NAME, name)]


class Run:
    def __init__(self, store: Store, name: str) -> None:
        if not re.fullmatch(NAME, name):
            raise UsageError(f"{name!r} is no name for a run: letters, digits, - and _ only")
        self.store, self.name, self.folder = store, name, store.root / "runs" / name

    @classmethod
    def find(cls, store: Store, name: str | None) -> Run:
        """The run of that name, or the store's only one. Raises UsageError with the names there are."""
        names = [run.name for run in all_runs(store)]
        own = [one for one in names if not one.startswith(REPAIR)]
        if name is None and len(own) == 1:
            name = own[0]
        if name is None or name not in names:
            asked = f"no run {name!r}" if name else "say which run"
            close = suggest(name or "", names).partition(" (")[0]
            there = f"it has: {', '.join(names)}" if names else "it has none; `retort submit MANIFEST` makes one"
            raise UsageError(f"{asked} in store {store.root}{close}: {there}")
        return cls(store, name)

    @contextmanager
    def held(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only driver of this run. Raises Locked, naming the other, or waits as `hold` does."""
        with hold(self.folder / "lock", f"run {self.name} is being carried out", self.name, waiting):
            yield

    @contextmanager
    def making(self, artifact: Artifact, pool: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only one who makes an artifact, and parts in the pool that it shares with those of other extents.
        Raises Locked, or waits, as `hold` does."""
        with ExitStack() as stack:
            for fingerprint in dict.fromkeys((artifact.fingerprint, pool.name)):
                file = self.store.lock_of(artifact.kind, fingerprint)
                stack.enter_context(hold(file, f"{artifact.kind}/{fingerprint} is being made", self.name, waiting))
            yield

    def driver(self) -> Holder | None:
        """Who carries the run out now; None if nobody does."""
        return holder(self.folder / "lock")

    def uses(self) -> set[Path]:
        """Folders of the artifacts in its plan, of their pools and unfinished work, and of all that those artifacts
        were made from. Raises UsageError for a plan or a record that cannot be read."""
        used: set[Path] = set()
        for stage in self.plan().values():
            kind, fingerprint = stage["kind"], stage["fingerprint"]
            used |= {self.store.pool(kind, stage["pool"]), self.store.root / "work" / f"{kind}-{fingerprint}"}
            for folder in (self.store.folder(kind, fingerprint), *map(Path, stage["inputs"].values())):
                used |= set(lineage(folder))
        return {path.resolve() for path in used}

    def refuse_others(self, artifact: Artifact, pool: Path, what: str) -> None:
        """Raise Locked, with `what`, if another run that is under way now makes or reads the artifact or its pool."""
        for other in all_runs(self.store):
            if (
                other.name != self.name
                and other.driver()
                and {artifact.folder.resolve(), pool.resolve()} & other.uses()
            ):
                raise Locked(f"{what} is in use by run {other.name}, under way now; wait for it, or stop it")

    def freeze(self, resolved: Manifest, plan: Plan) -> None:
        """Keep what is to be done. Also called again for a run that is submitted anew."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "manifest.yaml", dump(resolved).encode("utf-8"))
        stages = {stage.name: stage.as_dict() for stage in plan}
        write_atomically(self.folder / "plan.json", json.dumps(stages, indent=2).encode("utf-8"))

    def manifest(self, overrides: Sequence[str] = ()) -> Loaded:
        """As it was resolved, but for the store, which is where the run was found: a store may be moved."""
        store = f"store={json.dumps(str(self.store.root), ensure_ascii=False)}"
        return load(self.folder / "manifest.yaml", [*overrides, store])

    def plan(self) -> dict[str, dict[str, Any]]:
        """The frozen plan by stage, empty before the first. Raises UsageError for one that cannot be read."""
        file = self.folder / "plan.json"
        try:
            plan: dict[str, dict[str, Any]] = json.loads(file.read_bytes())
            if all(stage.keys() >= PLANNED for stage in plan.values()):
                return plan
            why = "another version of Retort wrote it"
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            why = str(error)
        resume = f"retort resume {self.name} --store {self.store.root}"
        raise UsageError(f"{file} cannot be read ({why}); to plan the run anew: {resume}")

    def previous(self) -> dict[str, dict[str, Any]]:
        """The same, for a new plan to be compared with: one that cannot be read counts as none."""
        try:
            return self.plan()
        except UsageError:
            return {}

    def log_file(self, stage: str) -> Path:
        return self.folder / "logs" / f"{stage}.log"

    def event(self, event: str, stage: str | None = None, **details: Any) -> None:
        """Append one line; a single write, so that lines of two processes do not mix. A line that a crash cut off is
        ended first."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, "stage": stage, **details}) + "\n"
        with open(self.folder / "events.jsonl", "a+b") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = "\n" + line
            file.write(line.encode())

    def events(self) -> Iterator[Mapping[str, Any]]:
        try:
            with open(self.folder / "events.jsonl", "rb") as file:
                yield from filter(None, map(read_event, file))
        except FileNotFoundError:
            return


def read_event(line: bytes | str) -> dict[str, Any] | None:
    """One line of events.jsonl; None for what a crash or somebody else left there."""
    try:
        event = json.loads(line)
        wanted = {"time", "event", "stage"}
        wanted |= {"fingerprint", "done", "total", "unit"} if event.get("event") == "progress" else set()
        return event if wanted <= event.keys() else None
    except (ValueError, AttributeError):
        return None
