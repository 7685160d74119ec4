"""The settings of a part of a manifest, in words. They are read from the JSON Schema of its class."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.manifest.fields import config_in
from stages.base import Config

NAMED_BY = ("kind", "name")
"""Keys that name a class in a manifest. They are not listed among its settings."""
PLAIN = {"boolean": "true | false", "integer": "integer", "number": "number", "string": "text"}


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


@cache
def _properties(config: type[Config]) -> dict[str, Any]:
    """Name of a setting -> its JSON Schema. Some classes also take a plain text, so their schema is a union."""
    schema = config.model_json_schema()
    properties: dict[str, Any] = next(p["properties"] for p in (schema, *schema.get("anyOf", ())) if "properties" in p)
    return properties


@cache
def settings_of(config: type[Config]) -> Sequence[Setting]:
    """Every setting of a class except the key that names it. Settings that all stages share come last."""
    fields = {info.alias or name: info for name, info in config.model_fields.items()}
    settings = []
    for name in sorted(fields, key=lambda name: name in ("seed", "execution")):
        part, info = _properties(config)[name], fields[name]
        if name in NAMED_BY and "const" in part:
            continue
        default = part.get("default")
        settings.append(
            Setting(
                name=name,
                allowed=words(part),
                required=info.is_required(),
                default=_changed(default, config_in(info.annotation, info.metadata, default)),
                description=part.get("description", ""),
                config=config_in(info.annotation, info.metadata),
            )
        )
    return settings


def about(config: type[Config]) -> str:
    """The docstring of the class itself; empty if it has none."""
    return inspect.cleandoc(config.__dict__.get("__doc__") or "")


def words(part: Mapping[str, Any]) -> str:
    """The type and bounds in a part of a JSON Schema, in words: `integer, 1 to 1000`, `l1 | mse`."""
    match part:
        case {"format": text}:
            return str(text)
        case {"enum": values}:
            return " | ".join(one if isinstance(one, str) else json.dumps(one) for one in values)
        case {"const": value}:
            return value if isinstance(value, str) else json.dumps(value)
        case {"if": _, "then": names}:  # a Choice: a name, or a mapping with a name
            return words(names)
        case {"anyOf": several}:
            return " | ".join(words(one) for one in several if one != {"type": "null"})
        case {"prefixItems": entries}:
            return f"[{', '.join(map(words, entries))}]"
        case {"type": "array", "items": entry}:
            least, most = part.get("minItems", 0), part.get("maxItems")
            if least and least == most:
                return f"list of {least}: {words(entry)}"
            return f"list: {words(entry)}" + (f"; at least {least}" if least > 1 else "")
        case {"type": "object", "additionalProperties": dict(value)}:
            return f"{words(value)}, by name"
        case {"type": "object", "patternProperties": values}:
            return f"{words(*values.values())}, by name"
        case {"$ref": _} | {"type": "object"}:
            return "settings"
    limits = ": letters, digits, - and _" if "a-z" in part.get("pattern", "") else _limits(part)
    return PLAIN.get(part.get("type", ""), "any value") + limits


def _limits(part: Mapping[str, Any]) -> str:
    if "minimum" in part and "maximum" in part:
        return f", {part['minimum']} to {part['maximum']}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {part[key]}" for key, sign in signs.items() if key in part]
    return f" {' and '.join(found)}" if found else ""


def _changed(default: Any, config: type[Config] | None) -> Any:
    """A default as a manifest would have it. For settings, only the values that differ from their own defaults."""
    if config is None or not isinstance(default, dict):
        return default
    own = _properties(config)
    found = {name: value for name, value in default.items() if name in own and value != own[name].get("default")}
    return found.get("name", found) if list(found) == ["name"] else found
