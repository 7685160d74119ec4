"""Matrices and chains, and the names of the stages that they become.

A stage with `matrix:` becomes one stage, a member, for every combination of values:

student:
  matrix: {method.loss: [l1, l2], seed: [0, 1, 2]}    # student[loss=l1,seed=0], student[loss=l1,seed=1], ...

A stage with several rounds, a chain, becomes one stage for each round, its links. Each link reads the link before it:

student:
  method: {name: progressive, start_steps: 32, end_steps: 1}    # student/16, student/8, student/4, student/2, student/1

Stages that read the stage are repeated too: once for each member or link.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from pipeline.manifest.document import Document, Path
from pipeline.manifest.fields import inputs_of, replaced
from stages import KINDS
from stages.base import Config, Link, Stage
from stages.registry import PluginError

MAX_STAGES = 2000
"""Maximum number of stages of a manifest with matrices, and of copies of one stage that reads them."""

MAX_NAME_LENGTH = 120
"""Maximum number of characters between the brackets of a member's name."""


@dataclass(frozen=True)
class Axis:
    """A setting that a matrix varies: the stage's name in the manifest, and the path of the setting below it.

    The axis of a chain, whose values are its links, has an empty path.
    """

    stage: str
    path: tuple[str, ...]

    @property
    def spellings(self) -> tuple[str, str, str]:
        """Ways to write the axis in a name, from the shortest to one that is unique."""
        dotted = ".".join(self.path)
        return self.path[-1], dotted, f"{self.stage}.{dotted}"


class Matrix(Config):
    """Makes the stage once for every combination of values of some settings. Settings are given by dotted paths.

    `matrix: {method.loss: [l1, mse], seed: [0, 1, 2]}` of a stage `student` makes six members, from
    student[loss=l1,seed=0] to student[loss=mse,seed=2].

    You can name a value, for example one with many settings: `method: [{as: plain, value: {name: ..., loss: ...}},
    ...]`.

    A stage that reads `student` is made once for each member. A stage that reads two stages of one matrix gets members
    with equal values from both. To read a single member, give its whole name in quotes.

    In a chain, `student/4` is link 4 of every member, and `student[seed=0]` is every link of one member. Commands
    accept all of these names.
    """


Coordinates = Mapping[Axis, str]
"""The position of a stage in its matrices and its chain: axis -> the value of the axis, as written in names."""


@dataclass(frozen=True)
class Value:
    """One value of an axis, its name (`label`), and its place in the document."""

    label: str
    value: Any
    place: Path


def base_of(name: str) -> str:
    """The name of the stage in the manifest: `student` for `student/16[loss=l1,seed=2]`."""
    return name.partition("[")[0].partition("/")[0]


def groups_of(name: str) -> set[str]:
    """The names that stand for this stage and others. For `student/16[seed=2]`: `student` (all of them), `student/16`
    (the link of all members) and `student[seed=2]` (all links of the member)."""
    base, (link, *rest) = base_of(name), name.partition("[")
    return {base, link, base + "".join(rest)} - {name}


def chosen(names: Sequence[str], asked: str) -> list[str]:
    """Return the stages in `names` that `asked` means: the stage of that name, or all members or links of a group."""
    return [name for name in names if asked in {name, *groups_of(name)}]


# --- A stage's own matrix and chain, before anything is validated -------------------------------------


def expand(document: Document) -> dict[str, Coordinates]:
    """Replace each stage that has a `matrix` by its members, and each chain by its links, in `document.value`.

    Return the coordinates of the members and links."""
    stages = document.value.get("stages")
    if not isinstance(stages, dict):
        return {}
    coordinates: dict[str, Coordinates] = {}
    expanded: dict[str, Any] = {}
    for base, stage in stages.items():
        if not isinstance(stage, dict) or "matrix" not in stage:
            expanded[base] = stage
            continue
        axes = _axes(base, stage["matrix"], document)
        if not axes:
            continue
        count = math.prod(map(len, axes.values()))
        if len(expanded) + count > MAX_STAGES:
            text = f"makes {count} stages; a manifest may have at most {MAX_STAGES}"
            document.report(("stages", base, "matrix"), text)
            continue
        for values in product(*axes.values()):
            at = {axis: value.label for axis, value in zip(axes, values, strict=True)}
            name = name_of(base, at)
            if name in stages:
                text = f"the matrix of {base} makes a stage of this name; rename one of them"
                document.report(("stages", name), text)
            expanded[name] = {key: value for key, value in stage.items() if key != "matrix"}
            coordinates[name] = at
            document.origins["stages", name] = ("stages", base)
            for axis, value in zip(axes, values, strict=True):
                _set(expanded[name], axis.path, value, document)
                document.origins["stages", name, *axis.path] = value.place
    document.value["stages"] = _with_links(expanded, coordinates, document)
    return coordinates


def _axes(base: str, matrix: Any, document: Document) -> dict[Axis, list[Value]]:
    where: Path = ("stages", base, "matrix")
    axes: dict[Axis, list[Value]] = {}
    for path, values, place in _lists(matrix, (), where):
        if any(place[:length] in document.overrides for length in range(len(place) + 1)):
            axes.pop(Axis(base, path), None)  # --set replaces the axis in the text
        if not isinstance(values, list) or not values:
            document.report(place, "a list of values is needed, such as `seed: [0, 1, 2]`")
        elif path[0] in ("kind", "matrix"):
            document.report(place, f"{path[0]} cannot be varied by a matrix")
        elif any(path[: len(a.path)] == a.path or a.path[: len(path)] == path for a in axes):
            document.report(place, "the matrix varies this setting twice; keep one list")
        elif ("stages", base, *path) in document.overrides:
            text = f"is varied by the matrix; set stages.{base}.matrix.{'.'.join(path)} to a list instead"
            document.report(("stages", base, *path), text)
        else:
            axes[Axis(base, path)] = _values(values, place, document)
    if not isinstance(matrix, dict) or not matrix:
        document.report(where, "names no setting; give one or more, such as `seed: [0, 1, 2]`")
    return axes


def _lists(value: Any, path: tuple[str, ...], place: Path) -> Iterator[tuple[tuple[str, ...], Any, Path]]:
    """Yield (path, value, place) of each list of a matrix. `method.loss: [...]` and `method: {loss: [...]}` are the
    same."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _lists(inner, (*path, *str(key).split(".")), (*place, key))
    elif path:
        yield path, value, place


def _values(items: Sequence[Any], place: Path, document: Document) -> list[Value]:
    """Return the values of one axis, with short and unique labels. An item may be `{as: NAME, value: ...}`."""
    twice = [word for word, count in Counter(map(repr, items)).items() if count > 1]
    values: list[Value] = []
    names: list[str] = []
    for i, item in enumerate(items):
        if not isinstance(item, dict) or "as" not in item:
            values.append(Value(_label(item, i), item, (*place, i)))
            continue
        name = str(item["as"])
        if set(item) != {"as", "value"}:
            document.report((*place, i), "a named value is `{as: NAME, value: ...}`, with no other key")
        elif item["as"] != name or _label(name, i) != name:
            document.report((*place, i, "as"), "a name has at most 40 characters: letters, digits, _, ., + and -")
        values.append(Value(name, item.get("value"), (*place, i, "value")))
        names.append(name)
    counts = Counter(value.label for value in values)
    twice += [name for name in names if counts[name] > 1]
    for word in dict.fromkeys(twice):
        document.report(place, f"{word} is given twice")
    return [v if counts[v.label] == 1 else replace(v, label=f"{v.label}-{i}") for i, v in enumerate(values)]


def _label(value: Any, place: int) -> str:
    if isinstance(value, dict):
        value = value.get("name", place)
    if isinstance(value, dict | list):
        value = place
    word = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", word)[:40] or str(place)


def name_of(base: str, at: Coordinates) -> str:
    """The name of the stage at these coordinates: `student/16[seed=2]`."""
    base += "".join(f"/{value}" for axis, value in at.items() if not axis.path)
    at = {axis: value for axis, value in at.items() if axis.path}
    if not at:
        return base
    for spelling in range(3):
        labels = [axis.spellings[spelling] for axis in at]
        if len(set(labels)) == len(labels):
            break
    words = (re.sub(r"[^A-Za-z0-9_.]+", "-", label) for label in labels)
    inside = ",".join(f"{word}={value}" for word, value in zip(words, at.values(), strict=True))
    if len(inside) > MAX_NAME_LENGTH:  # names of log files have a limit
        inside = f"{inside[:MAX_NAME_LENGTH]}..{hashlib.sha256(inside.encode()).hexdigest()[:8]}"
    return f"{base}[{inside}]"


def _set(holder: dict[str, Any], path: Sequence[str], value: Value, document: Document) -> None:
    """Set a value inside `holder`. Mappings on the way to it are copied, because other members share them."""
    for i, part in enumerate(path[:-1]):
        if not isinstance(holder.get(part, {}), dict):
            text = f"{'.'.join(path[: i + 1])} is not a mapping here, so {path[i + 1]} cannot be set in it"
            document.report(value.place[:-1], text)
            return
        holder[part] = dict(holder.get(part, {}))
        holder = holder[part]
    holder[path[-1]] = value.value


def _with_links(stages: Mapping[str, Any], coordinates: dict[str, Coordinates], document: Document) -> dict[str, Any]:
    """Replace each stage that is a chain by its links, and add the coordinates of the links to `coordinates`."""
    expanded: dict[str, Any] = {}
    for name, stage in stages.items():
        is_link = "/" in name.partition("[")[0]  # the manifest of a run already has links as stages
        links = [] if is_link else _links(stage)
        if not links:
            expanded[name] = stage
        previous = None
        for link in links:
            at = {Axis(base_of(name), ()): link.label, **coordinates.get(name, {})}
            link_name = name_of(base_of(name), at)
            if link_name in stages:
                text = f"the chain of {name} makes a stage of this name; rename one of them"
                document.report(("stages", link_name), text)
            expanded[link_name] = link.settings if previous is None else {**link.settings, link.previous: previous}
            coordinates[link_name], previous = at, link_name
            document.origins["stages", link_name] = ("stages", name)
            for path, origin in link.origins.items():
                document.origins["stages", link_name, *path] = ("stages", name, *origin)
    return expanded


def _links(stage: Any) -> list[Link]:
    """The links of a chain, as `Stage.chain` says. Empty for another stage."""
    kind = stage.get("kind") if isinstance(stage, dict) else None
    try:
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        return list(cls.chain(stage)) if cls else []
    except PluginError:  # reported when the stage is validated
        return []


# --- Stages that read a matrix ------------------------------------------------------------------------


def expand_readers(
    stages: Mapping[str, Stage], coordinates: Mapping[str, Coordinates], document: Document
) -> dict[str, Stage]:
    """Repeat each stage that reads an expanded stage, once for each member. Each copy refers to single members.

    A copy that reads two stages of one matrix gets members with equal values from both.
    """
    at: dict[str, Coordinates] = {}
    done: dict[str, dict[str, Stage]] = {}
    by_base: dict[str, list[str]] = {}
    for name in stages:
        by_base.setdefault(base_of(name), []).append(name)

    def expanded(name: str) -> dict[str, Stage]:
        """Name -> settings of everything that a stage of the manifest becomes."""
        if name not in done:
            done[name] = {}
            for new, stage, place in copies_of(name, stages[name]):
                done[name][new], at[new] = stage, place
                if new != name:
                    document.origins["stages", new] = ("stages", name)
        return done[name]

    @cache
    def members(reference: str) -> dict[str, Coordinates]:
        """The stages that a reference stands for -> their coordinates, without the axes that the reference itself
        fixes, such as a link's number."""
        if reference in stages:
            return {name: at[name] for name in expanded(reference)}
        everything = (new for name in by_base.get(base_of(reference), []) for new in expanded(name))
        found = {new: at[new] for new in everything if reference in groups_of(new)}
        if reference == base_of(reference):
            return found
        fixed = {axis for one in found.values() for axis in one if len({two.get(axis) for two in found.values()}) == 1}
        return {name: {axis: value for axis, value in one.items() if axis not in fixed} for name, one in found.items()}

    def copies_of(name: str, stage: Stage) -> Iterator[tuple[str, Stage, Coordinates]]:
        """Yield (name, settings, coordinates) of the stage, once for each combination of members that it reads."""
        own = coordinates.get(name, {})
        read = {field: members(reference) for field, reference in inputs_of(stage).items()}
        read = {field: names for field, names in read.items() if names and [*names] != [inputs_of(stage)[field]]}
        count = 0
        for names in product(*read.values()):
            if count == MAX_STAGES:
                text = f"would be made more than {MAX_STAGES} times, once for each combination of its inputs"
                document.report(("stages", name), text, at_key=True)
                return
            positions = [by_name[n] for by_name, n in zip(read.values(), names, strict=True)]
            found = _merged([*(_without_links(position, own) for position in positions), own])
            if found is not None:
                count += 1
                new = name if found == own else name_of(base_of(name), found)
                yield new, replaced(stage, dict(zip(read, names, strict=True))), found

    return {new: stage for name in stages for new, stage in expanded(name).items()}


def _without_links(at: Coordinates, own: Coordinates) -> Coordinates:
    """Drop the chain's axis from `at`, the coordinates of an input, if the reader is in the same chain: the two are
    different links."""
    return {axis: value for axis, value in at.items() if axis.path or axis not in own}


def _merged(several: Sequence[Coordinates]) -> Coordinates | None:
    """Merge coordinates. None if two of them disagree about an axis."""
    merged: dict[Axis, str] = {}
    for coordinates in several:
        for axis, value in coordinates.items():
            if merged.setdefault(axis, value) != value:
                return None
    return merged
