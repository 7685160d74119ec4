"""Where a run stands, from its frozen plan, its events, the store and the locks."""

from __future__ import annotations

from typing import Any

from pipeline.locks import holder_of
from pipeline.runs import Run
from pipeline.store import RECORD


def status_of(run: Run) -> dict[str, dict[str, Any]]:
    """stage -> {state, kind, fingerprint, artifact, progress, ...}. States: done, running (by whom), failed (why),
    interrupted, stopped (its driver was killed), waiting."""
    last: dict[str, dict[str, Any]] = {}
    progress: dict[str, dict[str, Any]] = {}
    for event in run.events():
        if event["event"] == "progress":
            progress[event["stage"]] = dict(event)
        elif event["stage"]:
            last[event["stage"]] = dict(event)
    stages: dict[str, dict[str, Any]] = {}
    for name, planned in (run.plan() or {}).items():
        kind, fingerprint = planned["kind"], planned["fingerprint"]
        folder = run.store.folder(kind, fingerprint)
        state, detail = _state(run, folder.joinpath(RECORD).exists(), kind, fingerprint, last.get(name))
        stages[name] = {
            "state": state,
            "kind": kind,
            "fingerprint": fingerprint,
            "detail": detail,
            "artifact": str(folder),
        }
        if state not in ("done", "waiting") and progress.get(name, {}).get("fingerprint") == fingerprint:
            stages[name]["progress"] = {k: progress[name][k] for k in ("done", "total", "unit")}
    return stages


def _state(run: Run, sealed: bool, kind: str, fingerprint: str, last: dict[str, Any] | None) -> tuple[str, str]:
    if sealed:
        return "done", f"{last['seconds']:.0f} s" if last and "seconds" in last else "reused"
    holder = holder_of(run.store.lock_of(kind, fingerprint))
    if holder:
        return "running", holder
    if last is None or last.get("fingerprint") != fingerprint:
        return "waiting", ""
    endings = {
        "stage_failed": ("failed", last.get("error", "")),
        "stage_interrupted": ("interrupted", "resume to carry on"),
        "stage_started": ("stopped", "its driver is gone; resume to carry on"),
    }
    return endings.get(last["event"], ("waiting", ""))
