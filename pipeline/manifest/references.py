"""Check how stages refer to each other: unknown stages, wrong kinds, cycles. Sort them so that inputs come first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipeline.errors import suggest
from pipeline.manifest.document import Document
from pipeline.manifest.fields import inputs_of, is_artifact_path, marked, parts_of
from pipeline.manifest.matrix import base_of, groups_of
from stages.base import Content, Input, Stage


def check_cycles(stages: Mapping[str, Stage], document: Document) -> None:
    """Report one problem for each cycle."""
    after: dict[str, set[str]] = {}
    for name, stage in stages.items():
        after.setdefault(name, set()).update(r for r in inputs_of(stage).values() if not is_artifact_path(r))
        for group in groups_of(name):  # a reader of a whole matrix or chain reads each of its stages
            after.setdefault(group, set()).add(name)
    while True:
        try:
            TopologicalSorter(after).prepare()
            return
        except CycleError as error:
            *_, cycle = error.args  # each stage is read by the next
            path = cycle[::-1]
            document.report(("stages", path[0]), f"a cycle: {' -> '.join(path)}", at_key=True)
            after[path[0]].discard(path[1])


def check(stages: Mapping[str, Stage], invalid: Collection[str], document: Document) -> set[str]:
    """Report the problems of references, and return the names of the stages that have one.

    `invalid` are names of stages whose own settings are invalid. References to them are not checked.
    """
    skipped = {*invalid, *map(base_of, invalid)}
    wrong: set[str] = set()
    for name, stage in stages.items():
        before = len(document.problems)
        for content in marked(stage, Content):
            if not content.value.strip():
                document.report(("stages", name, *parts_of(content.path)), "empty; expected a path")
        for field in marked(stage, Input):
            reference, wanted = field.value, field.marker.kind
            path = ("stages", name, *parts_of(field.path))
            if is_artifact_path(reference) or {reference, base_of(reference)} & skipped:
                continue
            if reference not in stages:
                hint = suggest(reference, list(dict.fromkeys(n for n, s in stages.items() if s.kind == wanted)))
                text = f"give a stage of kind {wanted}, or the path of a sealed artifact"
                document.report(path, f"there is no stage {reference!r}{hint}; {text}")
            elif (kind := stages[reference].kind) != wanted:
                document.report(path, f"needs a stage of kind {wanted}; {reference!r} is of kind {kind}")
        if len(document.problems) > before:
            wrong.add(name)
    return wrong


def check_resources(
    stages: Mapping[str, Stage], invalid: Collection[str], resources: Mapping[str, Any], document: Document
) -> None:
    """Report the problems of `resources:`, whose keys must be names of stages, members or links."""
    for name, given in resources.items():
        meant = [stage for other, stage in stages.items() if name in {other, *groups_of(other)}]
        if not meant and name not in {*invalid, *map(base_of, invalid)}:
            hint = suggest(name, list(dict.fromkeys(map(base_of, stages))))
            document.report(("resources", name), f"there is no such stage{hint}", at_key=True)
        elif meant and given.workers > 1 and not meant[0].PARALLEL:
            text = f"a stage of kind {meant[0].kind} runs on one worker; set it to 1"
            document.report(("resources", name, "workers"), text)


def order(stages: Mapping[str, Stage], left_out: Collection[str]) -> list[str]:
    """Sort the names of stages: each comes as early as possible after the stages that it reads. Ties keep the order of
    the manifest.

    Stages in `left_out`, stages in a cycle, and all stages that depend on these are omitted.
    """
    sorter = TopologicalSorter[str](dict.fromkeys(stages, ()))  # ties keep the order in which names are added
    for name, stage in stages.items():
        read = {r for r in inputs_of(stage).values() if not is_artifact_path(r)}
        # a stage that waits for itself is never ready
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
