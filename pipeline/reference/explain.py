"""Implements `retort explain`: finds every name that a manifest may use, and describes its settings."""

from __future__ import annotations

import io
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from pipeline.errors import UsageError
from pipeline.manifest import Manifest
from pipeline.manifest.matrix import Matrix
from pipeline.reference.settings import Setting, about, settings_of
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
    the plug-in that provides it; None for built-in names. only: the setting, if one setting is explained."""

    name: str
    what: str
    used: str
    config: type[Config]
    package: str | None = None
    only: str | None = None

    @property
    def settings(self) -> list[Setting]:
        return [s for s in settings_of(self.config) if self.only in (None, s.name)]

    def as_dict(self) -> dict[str, Any]:
        """Return the topic for programs. `schema` is the JSON Schema of its class; `setting` names a single setting."""
        own = {"name": self.name, "what": self.what, "used": self.used, "package": self.package}
        return {**own, "setting": self.only, "schema": self.config.model_json_schema()}


def names() -> dict[str, list[str]]:
    """Return category -> names that can be explained. Imports no plug-ins."""
    found = {what: list(registry) for what, registry in REGISTRIES.items()}
    return {**found, GROUPS: ["manifest", "matrix", *sorted(_groups())]}


def topics(asked: str) -> list[Topic]:
    """Return all topics that `asked` can mean: a name in `names()`, a dotted path from one, or the name of a setting.

    Raises UsageError with the most similar name if there is none.
    """
    first, *path = asked.split(".")
    found = _named(first)
    for name in path:
        found = [inner for topic in found for inner in _inside(topic, name)]
    if not found and not path:
        classes = {topic.config: topic for topic in built_in()}
        found = [replace(t, only=asked) for t in classes.values() if any(s.name == asked for s in t.settings)]
    if found:
        return found
    known = {name for group in names().values() for name in group} | {s.name for t in built_in() for s in t.settings}
    close = get_close_matches(asked, sorted(known), n=1)
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


def _inside(topic: Topic, name: str) -> Iterator[Topic]:
    """Yield the setting of a topic with this name, or the settings inside it."""
    for setting in topic.settings if topic.only is None else ():
        if setting.name == name and setting.config:
            path = f"{topic.name}.{name}"
            yield Topic(path, GROUPS, path, setting.config, topic.package)
        elif setting.name == name:
            yield replace(topic, only=name)


def built_in() -> list[Topic]:
    """Return the topics of all built-in names, in the order of `names()`."""
    found = [(what, name) for what, registry in REGISTRIES.items() for name in registry.built_in]
    found += [(GROUPS, name) for name in names()[GROUPS]]
    return [topic for what, name in found for topic in _named(name) if topic.what == what]


# --- Settings that have settings -----------------------------------------------------------------------


@cache
def _groups() -> dict[str, dict[type[Config], list[str]]]:
    """Return name of a field -> class of its settings -> paths where it is used, for all built-in names."""
    groups: dict[str, dict[type[Config], list[str]]] = {}
    roots: list[tuple[str, type[Config]]] = [("manifest", Manifest)]
    roots += [root for registry in REGISTRIES.values() for root in registry.built_in.items()]
    for root, config in roots:
        for path, setting, inner in _walk(config, root):
            groups.setdefault(setting, {}).setdefault(inner, []).append(path)
    return groups


def _walk(config: type[Config], path: str) -> Iterator[tuple[str, str, type[Config]]]:
    for setting in settings_of(config):
        if setting.config:
            yield f"{path}.{setting.name}", setting.name, setting.config
            yield from _walk(setting.config, f"{path}.{setting.name}")


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
        registry = REGISTRIES.get(what)
        packages = {name: registry.package(name) if registry else None for name in found}
        shown = ", ".join(f"{name} ({package})" if package else name for name, package in packages.items())
        lines += ["", what, _filled(shown, "  ")]
    return "\n".join(lines)


def text(topic: Topic) -> str:
    """Return a topic as text for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    source = f", from the package {topic.package}" if topic.package else ""
    used = "" if topic.used == topic.name else f" ({topic.used})"
    paragraphs = [f"{topic.name}: {_singular(topic.what)}{source}{used}"]
    if topic.only is None:
        paragraphs += map(_filled, about(topic.config).split("\n\n"))
    grid = Table.grid("", "", padding=(0, 2, 0, 0))
    for name, said in _rows(topic.settings, "  ", topic.name):
        grid.add_row(name, Text(said))
    printed = io.StringIO()
    Console(width=_width(), file=printed, color_system=None).print(grid)
    paragraphs += ["\n".join(map(str.rstrip, printed.getvalue().splitlines()))]
    if topic.what == "stage kinds" and topic.only is None:
        paragraphs[-1] += "\n  Like any stage, it may also have a `matrix`: retort explain matrix"
    return "\n\n".join(paragraphs).rstrip()


def _singular(what: str) -> str:
    one = what.removesuffix("es" if what.endswith("sses") else "s")
    return what if what == GROUPS else f"{'an' if what[0] in 'aeiou' else 'a'} {one}"


def _rows(settings: Sequence[Setting], indent: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield each setting's name, indented, and what is said of it; then the same for the settings inside it."""
    for setting in settings:
        default = default_text(setting)
        need = "required" if setting.required else f"default {default}" if default else "may be left out"
        said = f"{setting.allowed}; {need}\n{setting.description}"
        elsewhere = setting.config and _shown_elsewhere(setting.config)
        yield indent + setting.name, f"{said}\nsee: retort explain {_reference(setting, path)}" if elsewhere else said
        if setting.config and not elsewhere:
            yield from _rows(settings_of(setting.config), f"{indent}    ", f"{path}.{setting.name}")


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


def _filled(paragraph: str, indent: str = "") -> str:
    return textwrap.fill(paragraph, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _width() -> int:
    return max(50, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
