"""What makes an artifact what it is, and the hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.base import Config, Content, Extent, Input, Neutral, Stage

DIGITS = 20
"""Hexadecimal digits of a fingerprint: 80 bits."""

NOT_SCIENCE = ("kind", "seed", "execution")
"""Fields of every stage that stand elsewhere in the identity, or nowhere."""


def identity(stage: Stage, seed: int, inputs: Mapping[str, str], contents: Mapping[str, str]) -> dict[str, Any]:
    """All that decides a stage's result: its kind and VERSION, validated settings (with the VERSION of those inside
    them, such as a method's, once it is above 1), seed, and the identities of what it reads. How it is executed is
    not among them."""
    return {
        "kind": stage.kind,
        "version": stage.VERSION,
        "seed": seed,
        "settings": _settings(stage, set(NOT_SCIENCE), extents=True),
        "inputs": dict(inputs),
        "contents": dict(contents),
    }


def fingerprint(of: Mapping[str, Any]) -> str:
    """Hash of an identity, independent of the order of its keys."""
    text = json.dumps(of, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:DIGITS]


def pool_fingerprint(stage: Stage, of: Mapping[str, Any]) -> str:
    """As `fingerprint`, but the same for settings that differ only in how much is made."""
    return fingerprint({**of, "settings": _settings(stage, set(NOT_SCIENCE), extents=False)})


def differences(before: Mapping[str, Any], after: Mapping[str, Any], files: Mapping[str, str]) -> Iterator[str]:
    """What changed between two identities, in words: `sampler.steps 50 -> 25`, `prompts.parquet changed`. `files`
    says what the contents of the second are called."""
    old, new = dict(_flat(before)), dict(_flat(after))
    for path in sorted({*old, *new}):
        if old.get(path) == new.get(path):
            continue
        group, _, name = path.partition(".")
        if group == "inputs":
            yield f"its input {name} is another"
        elif group == "contents":
            yield f"{Path(files.get(name, name)).name} changed"
        elif group == "version":
            yield f"{before['kind']} stages are made another way (VERSION {before['version']} -> {after['version']})"
        else:
            yield f"{name or group} {_word(old, path)} -> {_word(new, path)}"


def _word(values: Mapping[str, Any], path: str) -> str:
    first = "1" if path.endswith(".VERSION") else "(none)"
    return first if path not in values else str(values[path])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _elsewhere(config: Config) -> Iterator[str]:
    """Inputs and contents enter by what they hold, not by what they are called."""
    for name, info in type(config).model_fields.items():
        for marker in info.metadata:
            if isinstance(marker, Input | Content):
                yield name
            if isinstance(marker, Content) and marker.revision_field:
                yield marker.revision_field


def _settings(config: Config, left_out: set[str], extents: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    left_out = {*left_out, *_elsewhere(config)}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        markers = {type(marker) for marker in info.metadata}
        neutral = Neutral in markers and value == info.get_default(call_default_factory=True)
        if name in left_out or neutral or (Extent in markers and not extents):
            continue
        settings[name] = _plain(value, extents)
    return settings


def _plain(value: Any, extents: bool) -> Any:
    if isinstance(value, Config):
        version = {"VERSION": value.VERSION} if value.VERSION > 1 else {}
        return {**_settings(value, set(), extents), **version}
    if isinstance(value, list | tuple):
        return [_plain(item, extents) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, extents) for key, item in value.items()}
    return value
