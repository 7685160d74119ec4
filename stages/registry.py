"""Registries: the names that a manifest may use, and their classes.

A class is built in, or another installed package offers it by an entry point
(https://packaging.python.org/specifications/entry-points). A registry looks for entry points only to find a name that
is not built in, or to list all names. It imports a package's module only when one of its names is used. So planning
stays fast for manifests that use built-in names only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, TypeVar, get_args, get_origin

T = TypeVar("T")
NAME = r"[a-z][a-z0-9_]*"


class PluginError(Exception):
    """A class that a package offers cannot be used. The message names the package, the entry point and the cause."""


class Registry(Mapping[str, type[T]]):
    """A mapping from names to subclasses of `base`.

    `group` is the group of entry points. `key` is the field of `base` that holds the name in a manifest. If `key` is
    None, the names are classes of diffusers pipelines. Packages can neither replace built-in names nor offer `reserved`
    names.
    """

    def __init__(
        self,
        group: str,
        base: type[T],
        key: str | None,
        built_in: Mapping[str, type[T]],
        reserved: Collection[str] = (),
    ) -> None:
        self.group, self.base, self.key, self.built_in = group, base, key, built_in
        self._reserved = reserved
        self._loaded: dict[str, type[T]] = {}

    def __getitem__(self, name: str) -> type[T]:
        """Return the class. Raises KeyError for an unknown name, PluginError for a class that cannot be used."""
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._offered

    def __iter__(self) -> Iterator[str]:
        """Yield the built-in names, then the names that packages offer. No package is imported."""
        yield from self.built_in
        yield from self._offered

    def __len__(self) -> int:
        return len(self.built_in) + len(self._offered)

    def package(self, name: str) -> str | None:
        """Return the name of the package that offers `name`, or None for a built-in name.

        The names of several packages are joined by commas. Raises KeyError for an unknown name."""
        return None if name in self.built_in else ", ".join(sorted(map(_package, self._offered[name])))

    @cached_property
    def _offered(self) -> dict[str, list[EntryPoint]]:
        offered: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group), key=lambda entry: entry.name):
            if entry.name not in self.built_in:
                offered.setdefault(entry.name, []).append(entry)
        return offered

    def _load(self, name: str) -> type[T]:
        entries = self._offered[name]
        if len(entries) > 1:
            packages = " and ".join(sorted(map(_package, entries)))
            raise PluginError(
                f"{packages} both offer {name!r} (entry points of {self.group}); "
                "uninstall one of them, or rename one of the entry points"
            )
        entry = entries[0]
        reason = self._name_error(name)
        if reason is None:
            try:
                found = entry.load()
            except Exception as error:  # a package's module may fail in any way
                reason = f"it cannot be imported ({type(error).__name__}: {_first_line(error)})"
            else:
                reason = self._class_error(name, found)
        if reason is not None:
            where = f"entry point `{name} = {entry.value}` of {self.group}"
            raise PluginError(f"package {_package(entry)}, {where}: {reason}")
        loaded: type[T] = found
        return loaded

    def _name_error(self, name: str) -> str | None:
        if self.key and not re.fullmatch(NAME, name):
            return "a name consists of lower-case letters, digits and _, and starts with a letter"
        return "Retort reserves this name" if name in self._reserved else None

    def _class_error(self, name: str, found: object) -> str | None:
        wanted = f"{self.base.__module__}.{self.base.__name__}"
        if not isinstance(found, type) or not issubclass(found, self.base):
            return f"{found!r:.80} is not a subclass of {wanted}"
        if self.key is None:
            return None
        annotation = found.model_fields[self.key].annotation  # type: ignore[attr-defined]
        allowed = get_args(annotation) if get_origin(annotation) is Literal else (name,)
        return None if name in allowed else f"its class has {self.key}: {' or '.join(map(str, allowed))}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "(unknown package)"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
