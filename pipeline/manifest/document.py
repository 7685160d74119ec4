"""Parse a YAML text into plain values, with the line and column of every key and value for error messages.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: `1e-4` is a float, `no` and `off` are strings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import yaml

from pipeline.errors import ManifestError, suggest

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the document: ("stages", "pairs", "count")."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


MAX_INTEGER_LENGTH = 100
"""Maximum number of characters of an integer. The largest value of any setting has 19 digits."""
MAX_VALUES = 100_000
"""Maximum number of values of a manifest after its aliases are expanded. Nested lists of aliases grow exponentially."""

_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""The line breaks of YAML."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > MAX_INTEGER_LENGTH:  # Python refuses to print much longer integers
        raise ValueError(f"an integer of {len(text):,} characters; at most {MAX_INTEGER_LENGTH} are read")
    return int(text, 16) if text.startswith("0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass
class Document:
    """A parsed YAML text.

    `value` is the YAML as dicts, lists and scalars. `places` and `keys` give the (line, column) of each value and of
    each key, both counted from 0. `overrides` maps the paths set by --set to the text of the option.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    value: Any = None
    places: dict[Path, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    overrides: dict[Path, str] = field(default_factory=dict)
    origins: dict[Path, Path] = field(default_factory=dict)
    """Path of a value that a matrix or chain made -> the path in the text that it comes from."""

    def problem(self, path: Path, message: str, *, at_key: bool = False) -> str:
        """Return the message `file:line:column: path: message`, followed by the line itself and a caret.

        A path that is not in the text gets the place of its nearest parent. With `at_key` the caret points at the
        key, not at the value.
        """
        path = self._origin(path)
        dotted = ".".join(str(part) for part in path) or "manifest"
        for override, text in self.overrides.items():
            if path[: len(override)] == override:
                return f"--set {text}: {dotted}: {message}"
        place = self.keys.get(path) if at_key else None
        above = path
        while place is None:
            place = self.places.get(above) or self.keys.get(above)
            if not above:
                break
            above = above[:-1]
        return self.problem_at(place or (0, 0), f"{dotted}: {message}")

    def _origin(self, path: Path) -> Path:
        """Map a path in a matrix member or a link to its path in the text."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self._origin((*self.origins[path[:length]], *path[length:]))
        return path

    def problem_at(self, place: tuple[int, int], message: str) -> str:
        """Return `file:line:column: message` for a (line, column) counted from 0, followed by the line and a caret."""
        line, column = place
        shown = self.lines[line] if line < len(self.lines) else ""
        caret = re.sub(r"[^\t]", " ", shown[:column]) + "^"
        return f"{self.name}:{line + 1}:{column + 1}: {message}\n    {shown}\n    {caret}"

    def set(self, text: str) -> None:
        """Apply the override `text`, `a.b.c=VALUE`. VALUE is YAML. Raises ManifestError."""
        parts = re.fullmatch(r"((?:[^=\[]|\[[^\]]*\])+)=(.*)", text, re.DOTALL)  # = and . may stand in [...]
        path = tuple(re.split(r"\.(?![^\[]*\])", parts[1])) if parts else ()
        if not parts or not all(path):
            raise ManifestError([f"--set {text}: expected PATH=VALUE, such as stages.pairs.count=128"])
        try:
            value = parse(f"value: {parts[2]}", text).value["value"]
        except ManifestError:
            raise ManifestError([f"--set {text}: {parts[2]!r} is not YAML"]) from None
        holder = self.value
        for i, part in enumerate(path[:-1]):
            if part not in holder and path[:i] != ("stages",):  # a section that is not in the manifest
                holder[part] = {}
                self.overrides[path[: i + 1]] = text
            if not isinstance(holder.get(part), dict):
                where = ".".join(path[:i]) or "the manifest"
                raise ManifestError([f"--set {text}: there is no {part!r} in {where}{suggest(part, holder)}"])
            holder = holder[part]
        holder[path[-1]] = value
        self.overrides[path] = text


def parse(text: str, name: str) -> Document:
    """Parse a YAML text whose top level is a mapping. `name` is the file name in messages.

    Raises ManifestError, with the place of the problem, for any other text.
    """
    document = Document(name, _LINE_END.split(text))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except RecursionError:
        raise ManifestError([document.problem_at((0, 0), "the YAML is nested too deeply")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line, mark.column) if mark else (0, 0)
        raise ManifestError([document.problem_at(place, f"not YAML: {error.problem or error.context}")]) from None
    except yaml.reader.ReaderError as error:
        before = _LINE_END.split(text[: error.position])
        where = (len(before) - 1, len(before[-1]))
        raise ManifestError(
            [document.problem_at(where, f"not YAML: it contains the character {text[error.position]!r}")]
        ) from None
    problems: list[str] = []
    try:
        if node:
            _check_size(document, node)
        document.value = _Builder(document, loader, problems).build(node, ()) if node else {}
    except RecursionError:
        raise ManifestError([document.problem_at((0, 0), "the YAML is nested too deeply")]) from None
    if node and not isinstance(document.value, dict):
        problems.append(document.problem_at((0, 0), "a manifest is a mapping with name, store and stages"))
    if problems:
        raise ManifestError(problems)
    return document


def _check_size(document: Document, root: yaml.Node) -> None:
    """Raise ManifestError at the first node that holds more than MAX_VALUES values, or that contains itself."""
    sizes: dict[yaml.Node, int | None] = {}

    def size(node: yaml.Node) -> int:
        if node in sizes:
            known, place = sizes[node], (node.start_mark.line, node.start_mark.column)
            if known is None:
                raise ManifestError([document.problem_at(place, "an alias contains itself")])
            return known
        sizes[node] = None
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
        found = 1 + sum(map(size, inside))
        if found > MAX_VALUES:
            place = (node.start_mark.line, node.start_mark.column)
            raise ManifestError([document.problem_at(place, f"more than {MAX_VALUES:,} values, with aliases expanded")])
        sizes[node] = found
        return found

    size(root)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would not read as strings."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump(value: Any) -> str:
    """Return YAML that `parse` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


@dataclass
class _Builder:
    document: Document
    loader: _Loader
    problems: list[str]
    merged: list[yaml.Node] = field(default_factory=list)

    def build(self, node: yaml.Node, path: Path) -> Any:
        start = node.start_mark
        if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
            start = node.value[0][0].start_mark  # the first key, even if an anchor stands before it
        place = (start.line, start.column)
        self.document.places.setdefault(path, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, place)

    def _scalar(self, node: yaml.Node, place: tuple[int, int]) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, AttributeError) as error:  # such as !!timestamp before a word
            problem = getattr(error, "problem", None) or str(error)
            self.problems.append(self.document.problem_at(place, f"cannot be read: {problem}"))
            return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        if node not in self.merged:  # a mapping with an anchor is visited again at each alias
            self._check_duplicates(node.value)
            self.merged.append(node)
        try:
            self.loader.flatten_mapping(node)  # expand `<<: *anchor`; the mapping's own keys come last and win
        except yaml.MarkedYAMLError as error:
            self.problems.append(
                self.document.problem_at((node.start_mark.line, node.start_mark.column), str(error.problem))
            )
            return {}
        winning: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                winning[str(key.value)] = key, value
            else:
                place = (key.start_mark.line, key.start_mark.column)
                self.problems.append(self.document.problem_at(place, "a key must be a plain word"))
        result: dict[str, Any] = {}
        for name, (key, value) in winning.items():
            self.document.keys[(*path, name)] = (key.start_mark.line, key.start_mark.column)
            result[name] = self.build(value, (*path, name))
        return result

    def _check_duplicates(self, pairs: Sequence[tuple[yaml.Node, yaml.Node]]) -> None:
        seen: dict[str, int] = {}
        for key, _ in pairs:
            name = str(key.value)
            place = (key.start_mark.line, key.start_mark.column)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                text = f"duplicate key {name!r}, first given on line {seen[name] + 1}"
                self.problems.append(self.document.problem_at(place, text))
            seen[name] = place[0]
