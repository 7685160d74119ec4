"""Fields inside a stage's settings: find them by their markers, replace their values, write them as plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from stages.base import Choice, Config, Input, Stage

C = TypeVar("C", bound=Config)

LINK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[0-9]{1,6})+(\[[^/]*\])?")
"""The name of a chain's link, student/16. The path of an artifact ends in a fingerprint, which has more digits."""


@dataclass(frozen=True)
class Marked:
    """A field that has a value and carries a marker. `path` is its dotted path in the stage. `owner` is the settings
    object that holds it."""

    path: str
    marker: Any
    value: Any
    owner: Config


def marked(config: Config, marker: type, prefix: str = "") -> Iterator[Marked]:
    """Yield the fields that carry `marker` and are not None: fields of `config`, of settings inside it, and of settings
    in its lists."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if value is None:
            continue
        for found in info.metadata:
            if isinstance(found, marker):
                yield Marked(prefix + name, found, value, config)
        for place, inner in enumerate(value) if isinstance(value, list) else [("", value)]:
            if isinstance(inner, Config):
                yield from marked(inner, marker, f"{prefix}{name}.{place}.".replace("..", "."))


def replaced(config: C, values: Mapping[str, Any]) -> C:
    """Return a copy of `config` with other values at some dotted paths."""
    for path, value in values.items():
        config = _with(config, parts_of(path), value)
    return config


def _with(holder: Any, path: Sequence[str | int], value: Any) -> Any:
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(holder, list):
        return [_with(one, rest, value) if place == first else one for place, one in enumerate(holder)]
    return holder.model_copy(update={first: _with(getattr(holder, str(first)), rest, value)})


def inputs_of(stage: Stage) -> Mapping[str, str]:
    """Path of each input field -> the name of a stage, or the path of an artifact."""
    return {field.path: field.value for field in marked(stage, Input)}


def is_artifact_path(reference: str) -> bool:
    """Whether a reference is the path of a sealed artifact, not the name of a stage. A path contains a slash. A name
    has one only before the number of a link: student/16."""
    return "/" in reference and not LINK.fullmatch(reference)


def parts_of(path: str) -> list[str | int]:
    """The parts of a dotted path. Indices into lists become integers."""
    return [int(part) if part.isdigit() else part for part in path.split(".")]


def plain(config: Config) -> dict[str, Any]:
    """Return settings as JSON values. They validate to equal settings. A null is left out if it is the default."""
    values: dict[str, Any] = _plain(config, config.model_dump(mode="json", by_alias=True))
    return values


def _plain(value: Any, dumped: Any) -> Any:
    if isinstance(value, Config):
        return {
            info.alias or name: _plain(getattr(value, name), dumped[info.alias or name])
            for name, info in type(value).model_fields.items()
            if getattr(value, name) is not None or info.get_default(call_default_factory=True) is not None
        }
    if isinstance(value, list | tuple):
        return [_plain(one, other) for one, other in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _plain(one, dumped[key]) for key, one in value.items()}
    return dumped


def config_in(annotation: Any, metadata: Sequence[Any] = (), value: Any = None) -> type[Config] | None:
    """Return the class of the settings that a field holds, directly or in a list or mapping. None if it holds none.

    For a choice, the class is the one that `value` names. `value` is not validated yet.
    """
    markers = (*metadata, *getattr(annotation, "__metadata__", ()))
    for choice in (marker for marker in markers if isinstance(marker, Choice)):
        return choice.of(value)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next(filter(None, (config_in(inner, (), value) for inner in get_args(annotation))), None)
