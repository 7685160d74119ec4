"""The state of runs and of their stages, from frozen plans, events, the store and the locks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.runs.history import Attempt, attempts
from pipeline.runs.run import Run, all_runs
from pipeline.store import RECORD, Store, holder, read_record
from pipeline.store.artifacts import READ_ERRORS


def status_of(run: Run) -> dict[str, dict[str, Any]]:
    """stage -> {state, kind, fingerprint, artifact, detail, progress, per_second, seconds_left, device_seconds}.

    States: done; running (`detail` says by which process); failed (`detail` says why); interrupted; stopped (the driver
    was killed); waiting. `progress`, `per_second` and `seconds_left` are missing where they are unknown.
    """
    tried = attempts(run.events())
    stages = run.plan().items()
    return {name: _stage(run, planned, tried.get((name, planned["fingerprint"]))) for name, planned in stages}


def _stage(run: Run, planned: Mapping[str, Any], last: Attempt | None) -> dict[str, Any]:
    kind, fingerprint = planned["kind"], planned["fingerprint"]
    folder = run.store.folder(kind, fingerprint)
    found: dict[str, Any] = {"kind": kind, "fingerprint": fingerprint, "artifact": str(folder)}
    cost = last.device_seconds if last else 0.0
    if (folder / RECORD).exists():
        made = last is not None and last.ended == "done"
        found |= {"state": "done", "detail": "" if made else "reused"}
        cost = cost if made else _recorded_cost(folder)
    else:
        maker = holder(run.store.lock_of(kind, fingerprint))
        state, detail = ("running", str(maker)) if maker else _ended(last)
        found |= {"state": state, "detail": detail}
        by_other_run = maker is not None and maker.run != run.name  # its progress is in the events of that run
        if last and last.progress and state != "waiting" and not by_other_run:
            found |= _progress(last, running=state == "running")
    return found | {"device_seconds": round(cost, 3)}


def _ended(last: Attempt | None) -> tuple[str, str]:
    if last is None:
        return "waiting", ""
    return {
        "failed": ("failed", last.error),
        "interrupted": ("interrupted", "resume to carry on"),
        "done": ("waiting", "its artifact is gone; resume to make it again"),  # removed or unsealed since
        None: ("stopped", "its process is gone; resume to carry on"),
    }[last.ended]


def _progress(last: Attempt, running: bool) -> dict[str, Any]:
    newest, rate = last.progress[-1], last.rate()
    found: dict[str, Any] = {"progress": {k: newest[k] for k in ("done", "total", "unit")}}
    if rate is not None and running:
        found["per_second"] = rate
        found["seconds_left"] = round(max(0, newest["total"] - newest["done"]) / rate, 1)
    return found


def _recorded_cost(folder: Path) -> float:
    """Device-seconds in the record of a reused artifact; 0 for a record that cannot be read."""
    try:
        return float(read_record(folder)["device_seconds"])
    except READ_ERRORS:
        return 0.0


def runs_of(store: Store) -> dict[str, dict[str, Any]]:
    """run -> {state, done, stages, last, driver}. `done` and `stages` are numbers of stages. `last` is the UTC time of
    the newest event."""
    return {run.name: _run(run) for run in all_runs(store)}


def _run(run: Run) -> dict[str, Any]:
    driver, newest = run.driver(), None
    for event in run.events():
        newest = event["time"]
    found = {"last": newest, "driver": driver and str(driver)}
    try:
        states = [stage["state"] for stage in status_of(run).values()]
    except UsageError as error:
        return {"state": "damaged", "done": 0, "stages": 0, **found, "driver": str(error)}
    worst = next((s for s in ("failed", "interrupted", "stopped", "waiting", "running") if s in states), "done")
    return {"state": "running" if driver else worst, "done": states.count("done"), "stages": len(states), **found}
