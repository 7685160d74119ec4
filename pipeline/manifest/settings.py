"""Describe the settings of a part of a manifest in words. They are read from the classes that validate them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.manifest.fields import config_in
from stages.base import Choice, Config, Content, Input

NAMED_BY = ("kind", "name")
"""Keys that name a class in a manifest. They are not listed among its settings."""
PLAIN = {bool: "true | false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Setting:
    """One setting. `default` is a plain value; None if the setting is required, or is unset by default."""

    name: str
    allowed: str
    """Its type and bounds, in words."""
    required: bool
    default: Any
    description: str
    config: type[Config] | None
    """The class of its own settings, if it has any."""


def settings_of(config: type[Config]) -> Iterator[Setting]:
    """Yield every setting of a class except the key that names it. Settings that all stages share come last."""
    named = [key for key in NAMED_BY if _names_its_class(config, key)]
    fields = {name: info for name, info in config.model_fields.items() if name not in named}
    for name in sorted(fields, key=lambda name: name in ("seed", "execution")):
        info = fields[name]
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        yield Setting(
            name=info.alias or name,
            allowed=words(info.annotation, info.metadata),
            required=info.is_required(),
            default=_plain(default),
            description=info.description or _inherited(config, name),
            config=config_in(info.annotation, info.metadata),
        )


def about(config: type[Config]) -> str:
    """The docstring of the class itself; empty if it has none."""
    return inspect.cleandoc(config.__dict__.get("__doc__") or "")


def words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The type and bounds of a field, in words: `integer, 1 to 1000`, `l1 | mse`."""
    metadata = [
        inner for marker in metadata for inner in (marker.metadata if isinstance(marker, FieldInfo) else [marker])
    ]
    for marker in metadata:
        if isinstance(marker, Choice):
            return " | ".join(marker.registry)
        if isinstance(marker, Input):
            return f"a stage of kind {marker.kind}, or the path of such an artifact"
        if isinstance(marker, Content):
            return "path or hub id" if marker.revision_field else "path"
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(inside[0], [*inside[1:], *metadata])
    if origin in (Union, UnionType):
        return " | ".join(words(one, metadata) for one in inside if one is not NoneType)
    if origin is Literal:
        return " | ".join(one if isinstance(one, str) else json.dumps(one) for one in inside)
    if origin is list or (origin is tuple and inside[1:] == (...,)):
        return _list_words(words(inside[0]), metadata)
    if origin is tuple:
        return f"[{', '.join(map(words, inside))}]"
    if origin is dict:
        return f"{words(inside[1])}, by name"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "settings"
    return PLAIN.get(annotation, "any value") + _bounds(metadata)


def _list_words(entry: str, metadata: Sequence[Any]) -> str:
    least = next((m.min_length for m in metadata if isinstance(m, bounds.MinLen)), 0)
    most = next((m.max_length for m in metadata if isinstance(m, bounds.MaxLen)), None)
    if least and least == most:
        return f"list of {least}: {entry}"
    return f"list: {entry}" + (f"; at least {least}" if least > 1 else "")


def _bounds(metadata: Sequence[Any]) -> str:
    if any(isinstance(marker, StringConstraints) and "a-z" in str(marker.pattern) for marker in metadata):
        return ": letters, digits, - and _"
    low, high = _bound(metadata, bounds.Ge, "ge"), _bound(metadata, bounds.Le, "le")
    if low is not None and high is not None:
        return f", {low} to {high}"
    limits = {">=": low, ">": _bound(metadata, bounds.Gt, "gt"), "<=": high, "<": _bound(metadata, bounds.Lt, "lt")}
    found = [f"{sign} {value}" for sign, value in limits.items() if value is not None]
    return f" {' and '.join(found)}" if found else ""


def _bound(metadata: Sequence[Any], kind: type, name: str) -> Any:
    return next((getattr(marker, name) for marker in metadata if isinstance(marker, kind)), None)


def _names_its_class(config: type[Config], key: str) -> bool:
    """Whether the field is a Literal of one word: the key that names this class."""
    info = config.model_fields.get(key)
    return info is not None and get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1


def _inherited(config: type[Config], name: str) -> str:
    """The description in a base class, for a field that a subclass declares again without one."""
    fields = (base.model_fields.get(name) for base in config.__mro__[1:] if issubclass(base, Config))
    return next((info.description for info in fields if info is not None and info.description), "")


def _plain(value: Any) -> Any:
    """A default as it would be written in a manifest. For settings, only the values that were given explicitly."""
    if value is PydanticUndefined:
        return None
    if isinstance(value, Config):
        given = {name: _plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
        return given["name"] if list(given) == ["name"] else given  # written as the name alone
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
