"""Check how stages refer to each other: unknown stages, wrong kinds, cycles. Sort them so that inputs come first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipeline.errors import suggest
from pipeline.manifest.document import Document
from pipeline.manifest.fields import inputs_of, is_artifact_path, marked, parts_of
from pipeline.manifest.matrix import base_of, groups_of
from stages.base import Content, Input, Stage


def cycles(stages: Mapping[str, Stage], document: Document) -> list[str]:
    """Return one problem for each cycle."""
    after: dict[str, set[str]] = {}
    for name, stage in stages.items():
        after.setdefault(name, set()).update(r for r in inputs_of(stage).values() if not is_artifact_path(r))
        for group in groups_of(name):  # a reader of a whole matrix or chain reads each of its stages
            after.setdefault(group, set()).add(name)
    problems: list[str] = []
    while True:
        try:
            TopologicalSorter(after).prepare()
            return problems
        except CycleError as error:
            *_, cycle = error.args  # each stage is read by the next
            path = cycle[::-1]
            problems.append(document.problem(("stages", path[0]), f"a cycle: {' -> '.join(path)}", at_key=True))
            after[path[0]].discard(path[1])


def problems(stages: Mapping[str, Stage], invalid: Collection[str], document: Document) -> dict[str, list[str]]:
    """stage -> the problems of its references. `invalid` are names of stages whose own settings are invalid."""
    found = {name: list(_problems_of(name, stage, stages, invalid, document)) for name, stage in stages.items()}
    return {name: problems for name, problems in found.items() if problems}


def _problems_of(
    name: str, stage: Stage, stages: Mapping[str, Stage], invalid: Collection[str], document: Document
) -> Iterator[str]:
    for content in marked(stage, Content):
        if not content.value.strip():
            yield document.problem(("stages", name, *parts_of(content.path)), "empty; expected a path")
    for field in marked(stage, Input):
        reference, wanted = field.value, field.marker.kind
        path = ("stages", name, *parts_of(field.path))
        target = stages.get(reference)
        if is_artifact_path(reference) or {reference, base_of(reference)} & {*invalid, *map(base_of, invalid)}:
            continue
        if target is None:
            fitting = list(dict.fromkeys(n for n, s in stages.items() if s.kind == wanted))
            yield document.problem(
                path,
                f"there is no stage {reference!r}{suggest(reference, fitting)}; "
                f"give a stage of kind {wanted}, or the path of a sealed artifact",
            )
        elif target.kind != wanted:
            yield document.problem(path, f"needs a stage of kind {wanted}; {reference!r} is of kind {target.kind}")


def resource_problems(
    stages: Mapping[str, Stage], invalid: Collection[str], resources: Mapping[str, Any], document: Document
) -> Iterator[str]:
    """Yield the problems of `resources:`, whose keys must be names of stages, members or links."""
    for name, given in resources.items():
        path = ("resources", name)
        meant = [stage for other, stage in stages.items() if name in {other, *groups_of(other)}]
        if not meant and name not in {*invalid, *map(base_of, invalid)}:
            hint = suggest(name, list(dict.fromkeys(map(base_of, stages))))
            yield document.problem(path, f"there is no such stage{hint}", at_key=True)
        elif meant and given.workers > 1 and not meant[0].PARALLEL:
            yield document.problem(
                (*path, "workers"), f"a stage of kind {meant[0].kind} runs on one worker; set it to 1"
            )


def order(stages: Mapping[str, Stage], left_out: Collection[str]) -> list[str]:
    """Sort the names of stages: each comes as early as possible after the stages that it reads. Ties keep the order of
    the manifest.

    Stages in `left_out`, stages in a cycle, and all stages that depend on these are omitted.
    """
    sorter = TopologicalSorter[str](dict.fromkeys(stages, ()))  # ties keep the order in which names are added
    for name, stage in stages.items():
        read = {r for r in inputs_of(stage).values() if not is_artifact_path(r)}
        # a stage that would wait for itself never comes
        sorter.add(name, *(read if name not in left_out and read <= stages.keys() else {name}))
    with suppress(CycleError):
        sorter.prepare()
    found: list[str] = []
    ready = [*sorter.get_ready()][::-1]
    while ready:
        found.append(ready.pop())
        sorter.done(found[-1])
        ready += sorter.get_ready()[::-1]
    return found
