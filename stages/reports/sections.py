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
    "In a mean over seeds, ± is the standard error of the seeds' own figures, and in brackets is the 95 % interval by "
    "Student's t. Call two means different only where their intervals do not overlap."
)


@dataclass(frozen=True)
class Evaluated:
    """A sealed evaluation: `metrics` and `shown` are its metrics.json and shown.json, `student` what its student is
    called, `training` how that was trained (keys of FIGURES), `origin` whose noises and teacher these are, in words.
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
    """`note` is what its name does not say, `picture` its strip of images, where it has one, `steps` its sampler's."""

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
    """The full teacher first, its few steps, references, then students, each mean over seeds after its students."""

    title: str
    shown: Mapping[str, Any]
    legend: Sequence[str]
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "shown": self.shown, "rows": [row.as_dict() for row in self.rows]}


def sections(evaluations: Iterable[Evaluated]) -> list[Section]:
    """Evaluations that disagree on the figures of their teacher are of different sections, whatever they show."""
    groups: list[_Group] = []
    for one in evaluations:
        group = next((group for group in groups if group.takes(one)), None)
        if group:
            group.add(one)
        else:
            groups.append(_Group(one))
    return [group.section() for group in groups]


class _Group:
    """Evaluations that agree."""

    def __init__(self, first: Evaluated) -> None:
        self.first = first
        self.common: dict[str, Row] = {}
        """Sides of the teacher, and references, by their names."""
        self.students: dict[tuple[str, int], list[Evaluated]] = {}
        """By the student's fingerprint, and in how many steps it was sampled."""
        self.add(first)

    def takes(self, one: Evaluated) -> bool:
        same = ("samples", "features", "distance_samples", "dtype", "micro_batch")
        return (
            one.shown == self.first.shown
            and all(one.metrics.get(key) == self.first.metrics.get(key) for key in same)
            and all(_agree(row.figures, self.common.get(name, row).figures) for name, row in _common(one))
        )

    def add(self, one: Evaluated) -> None:
        self.common = {**dict(_common(one)), **self.common}
        if one.metrics["student"]:
            steps = one.metrics["sides"]["student"]["network_calls"]
            self.students.setdefault((one.metrics["student"], steps), []).append(one)

    def section(self) -> Section:
        metrics = self.first.metrics
        features = f", measured in {metrics['features']}" if "features" in metrics else ""
        students = list(with_means(map(_student, self.students.values())))
        legend = figures.legend(metrics)
        if any(row.kind == "mean" for row in students):
            legend.append(MEANS)
        split = " validation" if metrics["split"] == "validation" else ""
        title = f"{self.first.origin}: {metrics['samples']}{split} samples{features}"
        return Section(title, self.first.shown, legend, [*sorted(self.common.values(), key=_place), *students])


def _common(one: Evaluated) -> Iterator[tuple[str, Row]]:
    for side, values in one.metrics["sides"].items():
        if side != "student":
            steps = int(side.removeprefix("teacher_"))
            yield side, Row(figures.title(side, values), "teacher", values, one.picture(side), steps=steps)
    for name, values in one.metrics.get("references", {}).items():
        yield name, Row(figures.title(name, values), "reference", values)


def _place(row: Row) -> tuple[bool, int]:
    """The teacher by its steps, most first, then references."""
    return row.kind == "reference", -int(row.figures.get("network_calls", 0))


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the figures are of one measurement. Last digits depend on threads and devices, seconds on the moment."""
    return one.keys() == other.keys() and all(
        math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-6) for key in one if key != "seconds_per_image"
    )


def _student(evaluations: Sequence[Evaluated]) -> Row:
    """The row of one student, which several evaluations, and several runs, may have measured alike."""
    first, *others = evaluations
    also = ", ".join(dict.fromkeys(one.student for one in others if one.student != first.student))
    values = {**first.training, **first.metrics["sides"]["student"]}
    note = f"also {also}" if also else ""
    return Row(first.student, "student", values, first.picture("student"), note, values["network_calls"])


# --- Means over seeds ---


def with_means(students: Iterable[Row]) -> Iterator[Row]:
    """The rows, and after those whose names differ in nothing but `seed=` in the brackets, their mean."""
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
    """`student[loss=l1,seed=2]` without its seed; None for a name that has none."""
    head, _, inside = name.partition("[")
    values = inside.removesuffix("]").split(",")
    kept = [value for value in values if not value.startswith(SEED)]
    if len(kept) == len(values):
        return None
    return f"{head}[{','.join(kept)}]" if kept else head


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each figure that all have: words and counts that are the same in all, else the mean, the standard error of the
    seeds `KEY_se`, and from `KEY_low` to `KEY_high` the mean's 95 % interval by Student's t (n - 1 degrees of freedom
    for n seeds)."""
    from scipy.special import stdtrit  # not sooner: it brings NumPy, which nothing else here needs

    width = float(stdtrit(len(rows) - 1, 0.975))  # 95 % lie between this and its negative
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
