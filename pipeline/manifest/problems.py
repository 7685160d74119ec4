"""Turn pydantic's validation errors into messages with a place in the manifest and a suggestion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic_core import ErrorDetails

from pipeline.errors import suggest
from pipeline.manifest.document import Document
from pipeline.manifest.fields import config_in
from stages.base import Config, Stage


def describe(model: type[Config], document: Document, error: ErrorDetails) -> str:
    """Describe one validation error of `document`, whose value was validated against `model`."""
    path = error["loc"]
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1], document.value)
        return document.problem(path, f"unknown key{suggest(str(path[-1]), known)}", at_key=True)
    if error["type"] == "unknown_choice":
        allowed = context["allowed"]
        given = error["input"]
        what = "missing" if given is None else f"unknown {path[-1]} {given!r}"
        return document.problem(path, f"{what}{suggest(str(given), allowed)}")
    if error["type"] == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return document.problem(path, f"unknown value {error['input']!r}{suggest(str(error['input']), allowed)}")
    if error["type"] == "string_pattern_mismatch":
        return document.problem(path, f"{error['input']!r} is not a valid name: use at most 80 letters, digits, - or _")
    if error["type"] == "missing":
        return document.problem(path, "missing; it has no default, so give a value")
    message = (
        error["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("valid tuple", "list")
    )
    given = error["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return document.problem(path, message[:1].lower() + message[1:] + shown)


def by_place(problems: Sequence[str]) -> list[str]:
    """Remove duplicates and sort by place in the file. Problems of --set come last."""

    def place(problem: str) -> tuple[bool, int, int]:
        found = re.match(r".*?:(\d+):(\d+): ", problem)
        return (False, int(found[1]), int(found[2])) if found else (True, 0, 0)

    return sorted(dict.fromkeys(problems), key=place)


def _fields_at(top: type[Config], path: Sequence[str | int], value: Any) -> list[str]:
    """The keys that are allowed in the mapping at `path`."""
    model: Any = top
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
            continue  # `model` is already that of the list's entries
        if isinstance(model, type) and issubclass(model, Config):
            info = next((i for name, i in model.model_fields.items() if part in (name, i.alias)), None)
            if info is None:
                return []
            is_mapping = get_origin(info.annotation) is dict
            model = info.annotation if is_mapping else config_in(info.annotation, info.metadata, value)
        else:  # a mapping of named configs: `stages`, `resources`
            model = config_in(get_args(model)[1], (), value)
    if not (isinstance(model, type) and issubclass(model, Config)):
        return []
    names = [info.alias or name for name, info in model.model_fields.items()]
    return [*names, "matrix"] if issubclass(model, Stage) else names
