"""Collect what `retort compare` shows: the evaluations of runs, and those that are not made yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.runs import Run, status_of
from pipeline.store import RECORD
from pipeline.store.artifacts import changed_files
from stages.evaluate import Evaluate, figures
from stages.reports.sections import Evaluated, Section


@dataclass(frozen=True)
class NotMade:
    """An evaluation of a run that cannot be compared yet. `why` is the reason."""

    run: Run
    stage: str
    why: str

    def as_dict(self) -> dict[str, str]:
        return {"run": self.run.name, "stage": self.stage, "why": self.why}


def collect(runs: Sequence[Run]) -> tuple[list[Evaluated], list[NotMade]]:
    """Return the sealed evaluations of these runs, and the evaluations that are not made.

    Raises UsageError for a run without an evaluation, and if no evaluation is sealed.
    """
    made: list[Evaluated] = []
    not_made: list[NotMade] = []
    for run in runs:
        stages, prefix = status_of(run), f"{run.name}/" if len(runs) > 1 else ""
        names = {stage["fingerprint"]: f"{prefix}{name}" for name, stage in stages.items()}
        evaluations = {name: stage for name, stage in stages.items() if stage["kind"] == "evaluate"}
        if not evaluations:
            raise UsageError(f"run {run.name} evaluates nothing; add a stage of `kind: evaluate` to its manifest")
        for name, stage in evaluations.items():
            why = f"{stage['state']}: {stage['detail']}" if stage["detail"] else stage["state"]
            if stage["state"] == "done":
                try:
                    made.append(_evaluated(Path(stage["artifact"]), f"{prefix}{name}", names))
                    continue
                except (OSError, ValueError, KeyError) as error:
                    why = f"made by an older version of Retort, or damaged: {error}"
            not_made.append(NotMade(run, name, why))
    if not made:
        raise UsageError("\n".join(["nothing to compare yet", *remarks(not_made)]))
    return made, not_made


def remarks(not_made: Sequence[NotMade]) -> list[str]:
    """Lines that say what is missing and which commands make it."""
    lines = [f"not made yet: stage {one.stage} of run {one.run.name} ({one.why})" for one in not_made]
    again = dict.fromkeys(f"retort resume {one.run.name} --store {one.run.store.root}" for one in not_made)
    return [*lines, *(f"carry on with: {command}" for command in again)]


def pictured(compared: Sequence[Section], names: Sequence[str]) -> Section:
    """Return the first section that has images of all these rows, with these rows alone, in this order.

    `NAME as LABEL` gives a row another name. If `names` is empty, all rows are kept. Raises UsageError if no section
    has the rows.
    """
    chosen = [name.partition(" as ")[::2] for name in names]
    for section in compared:
        rows = {row.name: row for row in section.rows if row.picture}
        if rows.keys() >= {name for name, _ in chosen}:
            found = [replace(rows[name], name=label or name) for name, label in chosen]
            return replace(section, rows=found or list(rows.values()))
    known = dict.fromkeys(row.name for section in compared for row in section.rows if row.picture)
    raise UsageError("\n".join(["no section has images of all the rows of --row; rows with images:", *known]))


def _evaluated(folder: Path, name: str, names: Mapping[str, str]) -> Evaluated:
    """Read a sealed evaluation. `names` maps the fingerprints of artifacts to the names of their stages.

    Raises OSError, ValueError or KeyError if the folder does not hold an evaluation of this version.
    """
    record, metrics, shown = (_read(folder / file) for file in (RECORD, "metrics.json", "shown.json"))
    version = record["identity"]["version"]
    if version != Evaluate.VERSION:
        raise ValueError(f"its VERSION is {version}; this Retort makes VERSION {Evaluate.VERSION}")
    if changed := next(changed_files(folder, record), None):
        raise ValueError(f"{folder / changed} is missing or changed")
    pairs = f"noises of {names.get(shown['pairs'], 'pairs/' + shown['pairs'])}, " if "pairs" in shown else ""
    origin = f"{pairs}teacher {names.get(shown['teacher'], 'teacher/' + shown['teacher'])}"
    side = figures.subject(metrics)
    training = _training(folder / record["inputs"][side] / RECORD) if side else {}
    measured: str = metrics[side] if side else ""
    label = _in_steps(names[measured], record["settings"].get("steps")) if measured in names else name
    return Evaluated(label, training, origin, folder, metrics, shown)


def _in_steps(name: str, steps: int | None) -> str:
    """Add `steps`, which replaces a student's own number of steps, to the student's name: student[seed=1,steps=8]."""
    if steps is None:
        return name
    head, _, inside = name.partition("[")
    return f"{head}[{','.join(filter(None, [inside.removesuffix(']'), f'steps={steps}']))}]"


def _training(path: Path) -> dict[str, Any]:
    """The method, steps and cost of a student's training, from its record."""
    record = _read(path)
    return {
        "method": record["settings"].get("method", record["settings"].get("objective"))["name"],
        "training_steps": record["settings"]["training"]["steps"],
        "trained_seconds": record["seconds"],
        "device_seconds": record["device_seconds"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
