"""Identities of artifacts, their hashes (fingerprints), and the changes between two identities.

The identity of an artifact is a dict of everything that decides its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.base import Config, Content, Extent, Input, Neutral, Stage

DIGITS = 20
"""Hexadecimal digits of a fingerprint: 80 bits."""

NOT_IN_SETTINGS = ("kind", "seed", "execution")
"""Fields of stages that the `settings` of an identity omit. `kind` and `seed` have their own keys in the identity.
`execution` must not change a result."""


def identity(stage: Stage, seed: int, inputs: Mapping[str, str], contents: Mapping[str, str]) -> dict[str, Any]:
    """Return the identity of a stage's artifact: the kind, VERSION, seed and validated settings of the stage, the
    fingerprints of its `inputs`, and the identities of its `contents`.

    Contents are files and repositories outside the store. Settings inside the stage, such as those of a method, contain
    their own VERSION if it is above 1. The settings in `execution` are omitted.
    """
    return {
        "kind": stage.kind,
        "version": stage.VERSION,
        "seed": seed,
        "settings": _settings(stage, True, NOT_IN_SETTINGS),
        "inputs": dict(inputs),
        "contents": dict(contents),
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the hash of an identity, DIGITS hexadecimal digits. The order of the keys does not matter."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:DIGITS]


def pool_fingerprint(stage: Stage, identity: Mapping[str, Any]) -> str:
    """Return the hash of a stage's identity without its `Extent` settings, such as the number of pairs.

    Artifacts that differ only in those settings share a pool."""
    return fingerprint({**identity, "settings": _settings(stage, False, NOT_IN_SETTINGS)})


def changes(before: Mapping[str, Any], after: Mapping[str, Any], files: Mapping[str, str]) -> Iterator[str]:
    """Yield the changes from one identity to another, in words: `sampler.steps 50 -> 25`, `prompts.parquet changed`.

    `files` maps the field path of each content of `after` to its path or repository.
    """
    old, new = dict(_flat(before)), dict(_flat(after))
    for path in sorted({*old, *new}):
        if old.get(path) == new.get(path):
            continue
        group, _, name = path.partition(".")
        if group == "inputs":
            yield f"its input {name} changed"
        elif group == "contents":
            yield f"{Path(files.get(name, name)).name} changed"
        elif group == "version":
            yield f"the code of {before['kind']} stages changed (VERSION {before['version']} -> {after['version']})"
        else:
            yield f"{name or group} {_word(old, path)} -> {_word(new, path)}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """Compare two plans: stage name -> `PlannedStage.as_dict()`. Return stage name -> its changes, in words."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            found[name] = ["removed"]
        elif name not in before:
            found[name] = ["added"]
        elif before[name]["kind"] != after[name]["kind"]:
            found[name] = [f"kind {before[name]['kind']} -> {after[name]['kind']}"]
        elif before[name]["fingerprint"] != after[name]["fingerprint"]:
            old, new = before[name]["identity"], after[name]["identity"]
            found[name] = list(changes(old, new, after[name]["files"]))
    return found


def _word(values: Mapping[str, Any], path: str) -> str:
    absent = "1" if path.endswith(".VERSION") else "(none)"
    return absent if path not in values else str(values[path])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _settings(config: Config, extents: bool, omitted: Collection[str] = ()) -> dict[str, Any]:
    """Return settings as plain values, without inputs, contents and hub revisions: the identity has their hashes."""
    settings: dict[str, Any] = {}
    fields = type(config).model_fields
    revisions = {m.revision_field for info in fields.values() for m in info.metadata if isinstance(m, Content)}
    for name, info in fields.items():
        value, markers = getattr(config, name), {type(marker) for marker in info.metadata}
        neutral = Neutral in markers and value == info.get_default(call_default_factory=True)
        elsewhere = name in omitted or name in revisions or markers & {Input, Content}
        if not (elsewhere or neutral or (Extent in markers and not extents)):
            settings[name] = _plain(value, extents)
    return settings


def _plain(value: Any, extents: bool) -> Any:
    if isinstance(value, Config):
        version = {"VERSION": value.VERSION} if value.VERSION > 1 else {}
        return {**_settings(value, extents), **version}
    if isinstance(value, list | tuple):
        return [_plain(item, extents) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, extents) for key, item in value.items()}
    return value
