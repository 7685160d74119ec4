"""A run's folder: what was asked, what was planned, what happened.

STORE/runs/NAME/manifest.yaml   resolved: defaults and overrides written out, paths absolute
STORE/runs/NAME/plan.json       frozen when the run was submitted
STORE/runs/NAME/events.jsonl    a JSON object a line: time, event, stage, ...
STORE/runs/NAME/logs/STAGE.log
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.errors import UsageError
from pipeline.locks import Holder, hold, holder
from pipeline.plan import Plan
from pipeline.store import Store
from stages.base import Artifact
from stages.data.files import write_atomically


def all_runs(store: Store) -> list[Run]:
    """Those that were planned, by name."""
    return [Run(store, path.parent.name) for path in sorted(store.root.glob("runs/*/plan.json"))]


def live(store: Store, besides: Run) -> Iterator[Run]:
    """Other runs that are being carried out."""
    return (run for run in all_runs(store) if run.name != besides.name and run.driver())


class Run:
    def __init__(self, store: Store, name: str) -> None:
        if not re.fullmatch(manifest.NAME, name):
            raise UsageError(f"{name!r} is no name for a run: letters, digits, - and _ only")
        self.store, self.name, self.folder = store, name, store.root / "runs" / name

    @classmethod
    def find(cls, store: Store, name: str | None) -> Run:
        """The run of that name, or the store's only one. Raises UsageError with the names there are."""
        names = [run.name for run in all_runs(store)]
        if name is None and len(names) == 1:
            name = names[0]
        if name is None or name not in names:
            asked = f"no run {name!r}" if name else "say which run"
            there = f"it has: {', '.join(names)}" if names else "it has none; `retort submit MANIFEST` makes one"
            raise UsageError(f"{asked}: {there} (store {store.root})")
        return cls(store, name)

    @contextmanager
    def held(self, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only driver of this run. Raises Locked, naming the other, or waits as `hold` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold(self.folder / "lock", f"run {self.name}", self.name, waiting):
            yield

    @contextmanager
    def making(self, artifact: Artifact, pool: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only one who makes an artifact, and parts in the pool that it shares with those of other extents.
        Raises Locked, or waits, as `hold` does."""
        with ExitStack() as stack:
            for fingerprint in dict.fromkeys((artifact.fingerprint, pool.name)):
                file = self.store.lock_of(artifact.kind, fingerprint)
                stack.enter_context(hold(file, f"{artifact.kind}/{fingerprint}", self.name, waiting))
            yield

    def driver(self) -> Holder | None:
        """Who carries the run out now; None if nobody does."""
        return holder(self.folder / "lock")

    def holds(self) -> set[str]:
        """Fingerprints of the artifacts and pools in its plan."""
        return {stage[which] for stage in (self.plan() or {}).values() for which in ("fingerprint", "pool")}

    def freeze(self, resolved: manifest.Manifest, plan: Plan) -> None:
        """Keep what is to be done. Also called again for a run that is submitted anew."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "manifest.yaml", manifest.dump(resolved).encode("utf-8"))
        stages = {stage.name: stage.as_dict() for stage in plan}
        write_atomically(self.folder / "plan.json", json.dumps(stages, indent=2).encode("utf-8"))

    def manifest(self, overrides: Sequence[str] = ()) -> manifest.Loaded:
        """As it was resolved, but for the store, which is where the run was found: a store may be moved."""
        store = f"store={json.dumps(str(self.store.root), ensure_ascii=False)}"
        return manifest.load(self.folder / "manifest.yaml", [*overrides, store])

    def plan(self) -> dict[str, dict[str, Any]] | None:
        """The frozen plan by stage; None before the first."""
        try:
            plan: dict[str, dict[str, Any]] = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            return plan
        except (FileNotFoundError, ValueError):
            return None

    def log_file(self, stage: str) -> Path:
        return self.folder / "logs" / f"{stage}.log"

    def event(self, event: str, stage: str | None = None, **details: Any) -> None:
        """Append one line; a single write, so that lines of two processes do not mix."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, "stage": stage, **details}, ensure_ascii=False)
        with open(self.folder / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def events(self) -> Iterator[Mapping[str, Any]]:
        try:
            with open(self.folder / "events.jsonl", encoding="utf-8") as file:
                for line in file:
                    try:
                        yield json.loads(line)
                    except ValueError:  # the last line of a killed driver
                        continue
        except FileNotFoundError:
            return
