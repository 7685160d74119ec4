"""Groups evaluations for comparison. A section holds evaluations with the same teacher, noises and prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from stages.evaluate import figures

SEED = "seed="
MEANS = (
    "For a mean over seeds, ± is the standard error over the seeds, and brackets hold the 95 % interval by Student's "
    "t. Call two means different only if their intervals do not overlap."
)


@dataclass(frozen=True)
class Evaluated:
    """A sealed evaluation.

    student: name of its student, or of its particles. training: figures of their training (keys of FIGURES). origin:
    names of the pairs and the teacher that its noises come from, as text. metrics, shown: its metrics.json and
    shown.json.
    """

    student: str
    training: Mapping[str, Any]
    origin: str
    folder: Path
    metrics: Mapping[str, Any]
    shown: Mapping[str, Any]

    def picture(self, side: str) -> Path:
        return self.folder / "rows" / f"{side}.png"


@dataclass(frozen=True)
class Row:
    """A row of a comparison. picture: its strip of images, if it has one. note: a remark. steps: its sampling steps."""

    name: str
    kind: Literal["teacher", "reference", "student", "mean"]
    figures: Mapping[str, Any]
    picture: Path | None = None
    note: str = ""
    steps: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name}: {self.note}" if self.note else self.name

    def as_dict(self) -> dict[str, Any]:
        picture = None if self.picture is None else str(self.picture)
        return {"name": self.name, "kind": self.kind, "note": self.note, "picture": picture, "figures": self.figures}


@dataclass(frozen=True)
class Section:
    """Evaluations that can be compared with each other.

    rows: the teacher in full steps, the teacher in few steps, references, and students. The mean over seeds follows its
    students.
    """

    title: str
    shown: Mapping[str, Any]
    legend: Sequence[str]
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "shown": self.shown, "rows": [row.as_dict() for row in self.rows]}


def sections(evaluations: Iterable[Evaluated]) -> list[Section]:
    """Group evaluations into sections. Those with different figures for the teacher are in different sections."""
    groups: list[_Group] = []
    for one in evaluations:
        group = next((group for group in groups if group.takes(one)), None)
        if group:
            group.add(one)
        else:
            groups.append(_Group(one))
    return [group.section() for group in groups]


class _Group:
    """Evaluations of one section."""

    def __init__(self, first: Evaluated) -> None:
        self.first = first
        self.common: dict[str, Row] = {}
        """Name -> row of a teacher's side or a reference."""
        self.students: dict[tuple[str, int], list[Evaluated]] = {}
        """(fingerprint of a student, sampling steps) -> its evaluations."""
        self.add(first)

    def takes(self, one: Evaluated) -> bool:
        """Whether an evaluation belongs to the group: same samples, settings, and figures of teacher and references."""
        same = ("guidance_scale", "samples", "features", "distance_samples", "dtype", "micro_batch")
        return (
            one.shown == self.first.shown
            and all(one.metrics.get(key) == self.first.metrics.get(key) for key in same)
            and all(_agree(row.figures, self.common.get(name, row).figures) for name, row in _common(one))
        )

    def add(self, one: Evaluated) -> None:
        self.common = {**dict(_common(one)), **self.common}
        side = figures.subject(one.metrics)
        if side:
            steps = one.metrics["sides"][side].get("network_calls", 0)
            self.students.setdefault((one.metrics[side], steps), []).append(one)

    def section(self) -> Section:
        metrics = self.first.metrics
        features = f", measured in {metrics['features']}" if "features" in metrics else ""
        students = list(with_means(map(_student, self.students.values())))
        legend = figures.legend(metrics)
        if any(row.kind == "mean" for row in students):
            legend.append(MEANS)
        split = " validation" if metrics.get("split") == "validation" else ""
        scale = metrics.get("guidance_scale")
        guided = f", guidance scale {scale}" if scale else ""
        title = f"{self.first.origin}{guided}: {metrics['samples']}{split} samples{features}"
        return Section(title, self.first.shown, legend, [*sorted(self.common.values(), key=_place), *students])


def _common(one: Evaluated) -> Iterator[tuple[str, Row]]:
    for side, values in one.metrics["sides"].items():
        if side != figures.subject(one.metrics):
            steps = int(side.removeprefix("teacher_"))
            yield side, Row(figures.title(side, values), "teacher", values, one.picture(side), steps=steps)
    for name, values in one.metrics.get("references", {}).items():
        yield name, Row(figures.title(name, values), "reference", values)


def _place(row: Row) -> tuple[bool, int]:
    """Return the sort key of a row: the teacher in descending steps, then references."""
    return row.kind == "reference", -int(row.figures.get("network_calls", 0))


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of figures agree. Seconds are ignored, and the last digits may differ between devices."""
    return one.keys() == other.keys() and all(
        math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-6) for key in one if key != "seconds_per_image"
    )


def _student(evaluations: Sequence[Evaluated]) -> Row:
    """Return the row of one student, which evaluations of several runs may have measured."""
    first, *others = evaluations
    also = ", ".join(dict.fromkeys(one.student for one in others if one.student != first.student))
    side = figures.subject(first.metrics)
    assert side
    values = {**first.training, **first.metrics["sides"][side]}
    note = f"also {also}" if also else ""
    return Row(first.student, "student", values, first.picture(side), note, values.get("network_calls"))


# --- Means over seeds ---


def with_means(students: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows. After rows whose names differ only in `seed=` in the brackets, yield their mean."""
    groups: dict[tuple[str | None, str], list[Row]] = {}
    for row in students:
        name = seedless(row.name)
        groups.setdefault((name, "" if name else row.name), []).append(row)
    for (name, _), rows in groups.items():
        yield from rows
        if name and len(rows) > 1:
            found = _mean([row.figures for row in rows])
            yield Row(name, "mean", found, note=f"mean of {len(rows)} seeds", steps=rows[0].steps)


def seedless(name: str) -> str | None:
    """Remove the seed from a name such as `student[loss=l1,seed=2]`. None if the name has no seed."""
    head, _, inside = name.partition("[")
    values = inside.removesuffix("]").split(",")
    kept = [value for value in values if not value.startswith(SEED)]
    if len(kept) == len(values):
        return None
    return f"{head}[{','.join(kept)}]" if kept else head


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means of figures over the rows of n seeds. Only figures that all rows have are included.

    A mean has its standard error `KEY_se` over the seeds, and its 95 % interval from `KEY_low` to `KEY_high` by
    Student's t with n - 1 degrees of freedom. Text and counts are kept if they are equal in all rows.
    """
    from scipy.special import stdtrit  # here, because it imports NumPy, which nothing else here needs

    width = float(stdtrit(len(rows) - 1, 0.975))  # half-width of the 95 % interval, in standard errors
    found: dict[str, Any] = {}
    for key in figures.FIGURES:
        values = [row[key] for row in rows if key in row]
        if len(values) < len(rows):
            continue
        if not isinstance(values[0], float) and len(set(values)) == 1:
            found[key] = values[0]
        elif not isinstance(values[0], str):
            mean, error = fmean(values), stdev(values) / len(values) ** 0.5
            found |= {key: mean, f"{key}_se": error}
            found |= {f"{key}_low": mean - width * error, f"{key}_high": mean + width * error}
    return found
