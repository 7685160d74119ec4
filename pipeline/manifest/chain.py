"""Chains: a stage with several rounds becomes several stages, its links. Each link reads the link before it.

student:
  method: {name: progressive, start_steps: 32, end_steps: 1}    # student/16, student/8, student/4, student/2, student/1

The class of the stage's kind says which links there are: `Stage.chain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.manifest.document import Document
from pipeline.manifest.matrix import Axis, Coordinates, base_of, is_link, name_of
from stages import KINDS
from stages.base import Link
from stages.registry import PluginError


def expand(document: Document, coordinates: Mapping[str, Coordinates]) -> dict[str, Coordinates]:
    """Replace each stage that is a chain by its links, in `document.value`.

    Return the coordinates of the matrix members, which are in `coordinates`, and of the links.
    """
    stages = document.value.get("stages")
    if not isinstance(stages, dict):
        return dict(coordinates)
    found, expanded = dict(coordinates), {}
    for name, stage in stages.items():
        links = [] if is_link(name) else _links(stage)  # the manifest of a run already has links as stages
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
            found[link_name], previous = at, link_name
            document.origins["stages", link_name] = ("stages", name)
            for path, origin in link.origins.items():
                document.origins["stages", link_name, *path] = ("stages", name, *origin)
    document.value["stages"] = expanded
    return found


def _links(stage: Any) -> list[Link]:
    kind = stage.get("kind") if isinstance(stage, dict) else None
    try:
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        return list(cls.chain(stage)) if cls else []
    except PluginError:  # reported when the stage is validated
        return []
