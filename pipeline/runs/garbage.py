"""Garbage collection: find and remove artifacts that no run refers to, and files of killed attempts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.errors import Locked, UsageError
from pipeline.runs.run import Run, all_runs
from pipeline.store import Store, hold, holder
from stages import KINDS
from stages.data.files import is_temporary


def collect(
    store: Store, drop: Sequence[str] = (), delete: bool = False, waiting: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Find garbage in the store; with `delete`, remove it.

    Returns {"found": [{path, bytes, what}], "bytes": their sum, "kept": [{path, why}], "deleted"}. `what` is artifact,
    pool, temporary or run. Artifacts under construction are kept. Runs named in `drop` count as garbage too.

    Raises UsageError for an unknown run in `drop`, and for a run whose plan cannot be read, because it could refer to
    anything. Raises Locked for a run in `drop` that is running. While another process makes a plan, Locked is raised or
    the call waits, as in `hold`.
    """
    if not (store.root / "runs").is_dir():
        raise UsageError(f"{store.root} is not a store; give one with --store or RETORT_STORE")
    dropped = [Run.find(store, name) for name in dict.fromkeys(drop)]
    with ExitStack() as stack:
        for run in dropped:
            if driver := run.driver():
                raise Locked(f"{driver} is running; stop it first: retort stop {run.name} --store {store.root}")
            stack.enter_context(run.held())
        stack.enter_context(hold(store.garbage_lock, "a plan is being made", "gc", waiting))
        # runs are listed only under the lock: until then, another process may write a plan
        return _collect(store, [run for run in all_runs(store) if run.name not in drop], dropped, delete)


def _collect(store: Store, runs: Sequence[Run], dropped: Sequence[Run], delete: bool) -> dict[str, Any]:
    used = {path for run in runs for path in run.uses()}
    found, kept = [], []
    for path, what, lock in [*_candidates(store, used), *((run.folder, "run", "") for run in dropped)]:
        if lock and (busy := holder(store.root / "locks" / lock)):
            kept.append({"path": str(path), "why": f"held by {busy}"})
            continue
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.lstat().st_size for file in files if file.is_file())
        found.append({"path": str(path), "what": what, "bytes": size})
        if delete:
            _remove(store, path)
    return {"found": found, "bytes": sum(one["bytes"] for one in found), "kept": kept, "deleted": delete}


def _candidates(store: Store, used: set[Path]) -> Iterator[tuple[Path, str, str]]:
    """Yield (path, what, name of the lock that is held while the path is being made)."""
    for kind in sorted(path.name for path in store.root.iterdir() if path.name in KINDS):
        for folder in sorted((store.root / kind).iterdir()):
            if folder.name != "pool" and folder.resolve() not in used:
                yield folder, "artifact", f"{kind}-{folder.name}"
        for pool in sorted((store.root / kind / "pool").glob("*")):
            if pool.resolve() not in used:
                yield pool, "pool", f"{kind}-{pool.name}"
                continue
            for leftover in sorted(filter(is_temporary, pool.rglob(".*"))):
                yield leftover, "temporary", f"{kind}-{pool.name}"
    for work in sorted((store.root / "work").iterdir()):
        if work.resolve() not in used:
            yield work, "temporary", work.name.removesuffix("-old")
    for leftover in sorted(filter(is_temporary, store.root.iterdir())):
        yield leftover, "temporary", ""  # of the hash cache, which has no lock


def _remove(store: Store, path: Path) -> None:
    if path.is_dir():
        gone = store.root / "work" / f"gone-{path.name}"  # moved away in one step, then deleted
        shutil.rmtree(gone, ignore_errors=True)
        path.replace(gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)
