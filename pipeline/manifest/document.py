"""Parse a YAML text into plain values, with the line and column of every key and value for error messages.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: `1e-4` is a float, `no` and `off` are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import yaml

from pipeline.errors import ManifestError, suggest

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the document: ("stages", "pairs", "count")."""

MAX_INTEGER_LENGTH = 100
"""Maximum number of characters of an integer. The largest value of any setting has 19 digits."""
MAX_VALUES = 100_000
"""Maximum number of values of a manifest after its aliases are expanded. Nested lists of aliases grow exponentially."""

_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""The line breaks of YAML."""
_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    """A parsed YAML text.

    `value` is the YAML as dicts, lists and scalars. `root` is the same as nodes, which know their places. `overrides`
    maps the paths set by --set to the text of the option.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    value: Any = field(default_factory=dict)
    root: yaml.Node | None = None
    overrides: dict[Path, str] = field(default_factory=dict)
    origins: dict[Path, Path] = field(default_factory=dict)
    """Path of a value that a matrix or chain made -> the path in the text that it comes from."""
    problems: list[str] = field(default_factory=list)

    def report(self, path: Path, message: str, *, at_key: bool = False) -> None:
        """Add the message of `problem` to the problems."""
        self.problems.append(self.problem(path, message, at_key=at_key))

    def problem(self, path: Path, message: str, *, at_key: bool = False) -> str:
        """Return the message `file:line:column: path: message`, followed by the line itself and a caret.

        With `at_key` the caret points at the key, not at the value.
        """
        path = self._origin(path)
        dotted = ".".join(str(part) for part in path) or "manifest"
        for override, text in self.overrides.items():
            if path[: len(override)] == override:
                return f"--set {text}: {dotted}: {message}"
        return self.problem_at(self.place(path, at_key), f"{dotted}: {message}")

    def _origin(self, path: Path) -> Path:
        """Map a path in a matrix member or a link to its path in the text."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self._origin((*self.origins[path[:length]], *path[length:]))
        return path

    def place(self, path: Path, at_key: bool = False) -> tuple[int, int]:
        """Return the (line, column) of a value or of its key, counted from 0.

        A path that is not in the text gets the place of its nearest parent.
        """
        key, node = None, self.root
        for part in path:
            key, inner = _child(node, part)
            if inner is None:
                break
            node = inner
        found = key if at_key and key else node
        return (found.start_mark.line, found.start_mark.column) if found else (0, 0)

    def problem_at(self, place: tuple[int, int], message: str) -> str:
        """Return `file:line:column: message` for a (line, column) counted from 0, followed by the line and a caret."""
        line, column = place
        shown = self.lines[line] if line < len(self.lines) else ""
        caret = re.sub(r"[^\t]", " ", shown[:column]) + "^"
        return f"{self.name}:{line + 1}:{column + 1}: {message}\n    {shown}\n    {caret}"

    def set(self, text: str) -> None:
        """Apply the override `text`, `a.b.c=VALUE`. VALUE is YAML. Raises ManifestError."""
        parts = re.fullmatch(r"((?:[^=\[]|\[[^\]]*\])+)=(.*)", text, re.DOTALL)  # brackets may contain = and .
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
            holder[part] = dict(holder[part])  # other places with the same anchor keep their value
            holder = holder[part]
        holder[path[-1]] = value
        self.overrides[path] = text


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Return the nodes of the key and of the value at a key or index; None for a node that does not exist."""
    if isinstance(node, yaml.MappingNode):  # a mapping's own keys come after those merged into it
        return next(((key, value) for key, value in reversed(node.value) if key.value == part), (None, None))
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return None, node.value[part]
    return None, None


def parse(text: str, name: str) -> Document:
    """Parse a YAML text whose top level is a mapping. `name` is the file name in messages.

    Raises ManifestError, with the place of the problem, for any other text.
    """
    document = Document(name, _LINE_END.split(text))
    try:
        loader = _Loader(text, document)
        document.root = loader.get_single_node()
        if document.root:
            loader.check(document.root, {})
            document.value = loader.construct_object(document.root, deep=True)
    except RecursionError:
        document.problems = [document.problem_at((0, 0), "the YAML is nested too deeply")]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line, mark.column) if mark else (0, 0)
        document.problems = [document.problem_at(place, f"not YAML: {error.problem or error.context}")]
    except yaml.reader.ReaderError as error:
        before = _LINE_END.split(text[: error.position])
        place = (len(before) - 1, len(before[-1]))
        what = f"not YAML: it contains the character {text[error.position]!r}"
        document.problems = [document.problem_at(place, what)]
    if not document.problems and not isinstance(document.value, dict):
        document.problems = [document.problem_at((0, 0), "a manifest is a mapping with name, store and stages")]
    if document.problems:
        raise ManifestError(document.problems)
    return document


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars. Every key is a string. Problems are added to the document."""

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self._document = document

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. It is None if the value cannot be read."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # such as !!timestamp before a word
            self._report(node, f"cannot be read: {getattr(error, 'problem', None) or error}")
            self.constructed_objects[node] = None
            return None

    def check(self, node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
        """Check the keys in a node, and return the number of its values, with aliases expanded.

        Raises ManifestError if a node holds more than MAX_VALUES values, or contains itself. `sizes` has the numbers of
        checked nodes, and 0 for a node that is being checked.
        """
        if node in sizes:
            if not sizes[node]:
                self._report(node, "an alias contains itself")
                raise ManifestError(self._document.problems)
            return sizes[node]
        sizes[node] = 0
        inside: Iterable[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.CollectionNode):  # tags of collections, such as !!set, change nothing
            node.tag = f"{_TAG}map" if isinstance(node, yaml.MappingNode) else f"{_TAG}seq"
        if isinstance(node, yaml.MappingNode):
            inside = chain.from_iterable(node.value)
            if node.value and not node.flow_style:
                node.start_mark = node.value[0][0].start_mark  # the first key, even if an anchor stands before it
            node.value = self._with_words_as_keys(node.value)
        found = 1 + sum(self.check(one, sizes) for one in inside)
        if found > MAX_VALUES:
            self._report(node, f"more than {MAX_VALUES:,} values, with aliases expanded")
            raise ManifestError(self._document.problems)
        sizes[node] = found
        return found

    def _with_words_as_keys(self, pairs: list[tuple[yaml.Node, yaml.Node]]) -> list[tuple[yaml.Node, yaml.Node]]:
        found: list[tuple[yaml.Node, yaml.Node]] = []
        lines: dict[str, int] = {}
        for key, value in pairs:
            if not isinstance(key, yaml.ScalarNode):
                self._report(key, "a key must be a plain word")
                continue
            if key.tag != f"{_TAG}merge":
                key = yaml.ScalarNode(f"{_TAG}str", key.value, key.start_mark, key.end_mark)
                if key.value in lines:
                    self._report(key, f"duplicate key {key.value!r}, first given on line {lines[key.value] + 1}")
                lines[key.value] = key.start_mark.line
            found.append((key, value))
        return found

    def _report(self, node: yaml.Node, message: str) -> None:
        place = (node.start_mark.line, node.start_mark.column)
        self._document.problems.append(self._document.problem_at(place, message))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > MAX_INTEGER_LENGTH:  # Python refuses to print much longer integers
        raise ValueError(f"an integer of {len(text):,} characters; at most {MAX_INTEGER_LENGTH} are read")
    return int(text, 16) if text.startswith("0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor(f"{_TAG}int", _construct_int)
_Loader.add_constructor(f"{_TAG}float", _construct_float)
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would not read as strings."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump(value: Any) -> str:
    """Return YAML that `parse` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
