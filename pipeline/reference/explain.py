"""Implements `retort explain`: finds every name that a manifest may use, and describes its settings."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pipeline.errors import UsageError
from pipeline.manifest import Manifest
from pipeline.manifest.matrix import Matrix
from pipeline.manifest.settings import Setting, about, settings_of
from stages import KINDS
from stages.base import Config, Execution
from stages.data.images.config import IMAGE_SETS
from stages.data.triplets.config import TRIPLET_SETS
from stages.losses.config import LOSSES
from stages.methods import METHODS
from stages.optimize.objectives import OBJECTIVES
from stages.optimize.representations import REPRESENTATIONS
from stages.registry import PluginError, Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "stage kinds": KINDS,
    "methods": METHODS,
    "losses": LOSSES,
    "objectives": OBJECTIVES,
    "representations": REPRESENTATIONS,
    "triplet sets": TRIPLET_SETS,
    "image sets": IMAGE_SETS,
}
USED_AS = {
    "stage kinds": "kind: {}",
    "methods": "method: {{name: {}}}",
    "losses": "loss: {{name: {}}}",
    "objectives": "objective: {{name: {}}}",
    "representations": "representation: {{name: {}}}",
    "triplet sets": "triplets: {{name: {}}}",
    "image sets": "dataset: {0} or images: {0}",
}
GROUPS = "settings"
WIDEST = 100


@dataclass(frozen=True)
class Topic:
    """A name that can be explained. what: its category, such as methods. used: where it is used in a manifest. package:
    the plug-in that provides it; None for built-in names."""

    name: str
    what: str
    used: str
    config: type[Config]
    package: str | None = None
    only: str | None = None
    """The name of a setting, if only that one is explained."""

    def settings(self) -> list[Setting]:
        return [s for s in settings_of(self.config) if self.only in (None, s.name)]

    def as_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "what": self.what, "used": self.used, "package": self.package}
        return {**own, "description": about(self.config), "settings": [_as_dict(s) for s in self.settings()]}


def names() -> dict[str, list[str]]:
    """Return category -> names that can be explained. Imports no plug-ins."""
    found = {what: list(registry) for what, registry in REGISTRIES.items()}
    return {**found, GROUPS: ["manifest", "matrix", *sorted(_groups())]}


def topics(asked: str) -> list[Topic]:
    """Return all topics that `asked` can mean: a name in `names()`, a dotted path from one, or the name of a setting.

    Raises UsageError with the most similar name if there is none.
    """
    first, _, path = asked.partition(".")
    found = _inside(_named(first), path.split(".")) if path else _named(asked)
    if not found and not path:
        classes = {topic.config: topic for topic in built_in()}
        found = [topic for topic in classes.values() if any(s.name == asked for s in topic.settings())]
        found = [Topic(t.name, t.what, t.used, t.config, t.package, only=asked) for t in found]
    if found:
        return found
    known = [name for group in names().values() for name in group]
    close = get_close_matches(asked, [*known, *_setting_names()], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise UsageError(f"nothing is called {asked!r}{hint} `retort explain` lists all names")


def _named(name: str) -> list[Topic]:
    found = []
    for what, registry in REGISTRIES.items():
        if name in registry:
            try:
                found.append(Topic(name, what, USED_AS[what].format(name), registry[name], registry.package(name)))
            except PluginError as error:
                raise UsageError(str(error)) from error
    if name == "manifest":
        found.append(Topic(name, GROUPS, "the whole file", Manifest))
    if name == "matrix":
        found.append(Topic(name, GROUPS, "of any stage", Matrix))
    return [*found, *(Topic(name, GROUPS, ", ".join(at), config) for config, at in _groups().get(name, {}).items())]


def _inside(found: Sequence[Topic], path: Sequence[str]) -> list[Topic]:
    """Follow a dotted path from topics to a group of settings or a single setting."""
    reached = []
    for topic in found:
        setting = next((s for s in settings_of(topic.config) if s.name == path[0]), None)
        if setting is None:
            continue
        name = f"{topic.name}.{setting.name}"
        if setting.config is None:
            one = Topic(topic.name, topic.what, topic.used, topic.config, topic.package, only=setting.name)
            reached += [one] if len(path) == 1 else []
        else:
            inner = Topic(name, GROUPS, name, setting.config, topic.package)
            reached += _inside([inner], path[1:]) if len(path) > 1 else [inner]
    return reached


# --- Settings that have settings -----------------------------------------------------------------------


@cache
def _groups() -> dict[str, dict[type[Config], list[str]]]:
    """Return name of a field -> class of its settings -> paths where it is used, for all built-in names."""
    groups: dict[str, dict[type[Config], list[str]]] = {}
    for root, config in _roots():
        for path, setting in _walk(config, root):
            if setting.config:
                groups.setdefault(setting.name, {}).setdefault(setting.config, []).append(path)
    return groups


def _roots() -> Iterator[tuple[str, type[Config]]]:
    yield "manifest", Manifest
    for registry in REGISTRIES.values():
        yield from registry.built_in.items()


def _walk(config: type[Config], path: str) -> Iterator[tuple[str, Setting]]:
    for setting in settings_of(config):
        yield f"{path}.{setting.name}", setting
        if setting.config:
            yield from _walk(setting.config, f"{path}.{setting.name}")


def built_in() -> list[Topic]:
    """Return the topics of all built-in names, in the order of `names()`."""
    return [
        topic
        for what, found in names().items()
        for name in found
        if not _package(what, name)
        for topic in _named(name)
        if topic.what == what
    ]


def _setting_names() -> set[str]:
    return {setting.name for root, config in _roots() for _, setting in _walk(config, root)}


def _shown_elsewhere(config: type[Config]) -> bool:
    """Whether settings are explained under their own name, because several places use them."""
    places = [place for classes in _groups().values() for place in classes.get(config, [])]
    return len(places) > 1 or issubclass(config, Execution)


# --- As text -------------------------------------------------------------------------------------------


def listing() -> str:
    """Return the list of all names, by category."""
    lines = ["retort explain NAME says what NAME is and lists its settings. NAME is one of these, or a path such as"]
    lines += ["pairs.sampler.steps."]
    for what, found in names().items():
        packages = {name: _package(what, name) for name in found}
        shown = ", ".join(f"{name} ({packages[name]})" if packages[name] else name for name in found)
        lines += [
            "",
            what,
            textwrap.fill(shown, _width(), initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
        ]
    return "\n".join(lines)


def _package(what: str, name: str) -> str | None:
    registry = REGISTRIES.get(what)
    return registry.package(name) if registry else None


def text(topic: Topic) -> str:
    """Return a topic as text for the terminal."""
    source = f", from the package {topic.package}" if topic.package else ""
    used = "" if topic.used == topic.name else f" ({topic.used})"
    lines = [f"{topic.name}: {_singular(topic.what)}{source}{used}", ""]
    if topic.only is None:
        for paragraph in about(topic.config).split("\n\n"):
            lines += [textwrap.fill(paragraph, _width()), ""]
    settings = topic.settings()
    if settings:
        lines += _lines(settings, "  ", topic.name)
    if topic.what == "stage kinds" and topic.only is None:
        lines.append("  Like any stage, it may also have a `matrix`: retort explain matrix")
    return "\n".join(lines).rstrip()


def _singular(what: str) -> str:
    one = what.removesuffix("es" if what.endswith("sses") else "s")
    return what if what == GROUPS else f"{'an' if what[0] in 'aeiou' else 'a'} {one}"


def _lines(settings: Sequence[Setting], indent: str, path: str) -> list[str]:
    width = max(len(setting.name) for setting in settings) + 2
    lines: list[str] = []
    for setting in settings:
        margin = indent + " " * width
        default = default_text(setting)
        need = "required" if setting.required else f"default {default}" if default else "may be left out"
        head = f"{indent}{setting.name.ljust(width)}"
        lines += textwrap.wrap(f"{setting.allowed}; {need}", _width(), initial_indent=head, subsequent_indent=margin)
        lines += textwrap.wrap(setting.description, _width(), initial_indent=margin, subsequent_indent=margin)
        if setting.config is None:
            continue
        if _shown_elsewhere(setting.config):
            lines.append(f"{margin}see: retort explain {_reference(setting, path)}")
        else:
            lines += _lines(list(settings_of(setting.config)), indent + "    ", f"{path}.{setting.name}")
    return lines


def _reference(setting: Setting, path: str) -> str:
    """Return the name under which the settings inside a setting are explained: a path if the name is ambiguous."""
    classes = list(_groups().get(setting.name, {}))
    taken = any(setting.name in registry.built_in for registry in REGISTRIES.values())
    return setting.name if classes == [setting.config] and not taken else f"{path}.{setting.name}"


def default_text(setting: Setting) -> str:
    """Return a default as it is written in a manifest. Empty if there is no default, or if the default is a group of
    settings with their own defaults."""
    value = setting.default
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {_word(inner)}" for key, inner in value.items())
        return f"{{{inside}}}" if inside else ""
    return "" if value is None else _word(value)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _width() -> int:
    return max(50, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def _as_dict(setting: Setting) -> dict[str, Any]:
    inner = [_as_dict(s) for s in settings_of(setting.config)] if setting.config else []
    return {
        "name": setting.name,
        "type": setting.allowed,
        "required": setting.required,
        "default": setting.default,
        "description": setting.description,
        **({"settings": inner} if inner else {}),
    }
