"""A manifest: read, overridden, validated whole. Every error says file, line, column, path and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from pipeline import document as yaml_document
from pipeline.document import Document
from pipeline.errors import ManifestError, UsageError
from pipeline.store import is_url
from stages import KINDS
from stages.base import Choice, Config, Content, Input, Stage

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$"
C = TypeVar("C", bound=Config)
Name = Annotated[str, StringConstraints(pattern=NAME)]


class Resources(Config):
    """What each worker of a stage gets. Never part of a fingerprint."""

    workers: int = Field(1, ge=1, description="processes, of the cluster or of this machine")
    gpus_per_worker: float = Field(0.0, ge=0, description="below 1: workers share a GPU")


class Manifest(Config):
    """One pipeline: its stages, and where their artifacts are kept."""

    name: Name = Field(description="of the run")
    seed: int = Field(0, ge=0, description="of every stage without a seed of its own")
    store: str = Field("./retort-store", description="the folder for artifacts and runs; on a cluster, a shared one")
    stages: dict[Name, Annotated[Stage, Choice("kind", KINDS)]] = Field(
        min_length=1, description="by a name of your choice, by which other stages refer to them"
    )
    resources: dict[str, Resources] = Field(
        default_factory=dict, description="by stage: what its workers get; makes nothing stale"
    )

    def seed_of(self, stage: str) -> int:
        own = self.stages[stage].seed
        return self.seed if own is None else own


@dataclass(frozen=True)
class Loaded:
    """A valid manifest and the text it came from, for problems that show up later."""

    manifest: Manifest
    document: Document
    order: list[str]
    """Names of stages, each after the stages that it reads."""

    def problem(self, stage: str, field: str, message: str) -> str:
        return self.document.problem(("stages", stage, *_keys(field)), message)


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and validate. Raises ManifestError with every problem found, UsageError for an unreadable file."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 (byte {error.start})") from None
    return loads(text, str(path), overrides)


def loads(text: str, name: str, overrides: Sequence[str] = ()) -> Loaded:
    """As `load`, from a text; `name` is what errors call it."""
    document = yaml_document.parse(text, name)
    for override in overrides:
        document.set(override)
    try:
        manifest = Manifest.model_validate(document.value)
    except ValidationError as error:
        raise ManifestError([_explain(document, e) for e in error.errors(include_url=False)]) from None
    problems = [*_check_references(manifest, document), *_check_resources(manifest, document)]
    order = _order(manifest, document, problems)
    if problems:
        raise ManifestError(problems)
    return Loaded(_absolute(manifest), document, order)


def dump(manifest: Manifest) -> str:
    """The resolved manifest as YAML that `loads` reads back to an equal one."""
    values = manifest.model_dump(mode="json", by_alias=True)
    values["stages"] = {
        name: stage.model_dump(mode="json", by_alias=True, exclude_none=True) for name, stage in manifest.stages.items()
    }
    return yaml_document.dump(values)


@dataclass(frozen=True)
class Marked:
    """A field that is given and carries a marker: its dotted path below the stage, the settings it stands in."""

    path: str
    marker: Any
    value: Any
    owner: Config


def marked(config: Config, marker: type, prefix: str = "") -> Iterator[Marked]:
    """Every such field of a stage, in the settings inside it and in lists of settings too."""
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
    """`config` with other values at some dotted paths."""
    updates: dict[str, Any] = {}
    for name in {path.partition(".")[0] for path in values}:
        inside = {p.partition(".")[2]: v for p, v in values.items() if p.partition(".")[0] == name}
        if "" in inside:
            updates[name] = inside[""]
        elif isinstance(old := getattr(config, name), list):
            updates[name] = [
                replaced(one, {p.partition(".")[2]: v for p, v in inside.items() if p.partition(".")[0] == str(place)})
                for place, one in enumerate(old)
            ]
        else:
            updates[name] = replaced(old, inside)
    return config.model_copy(update=updates)


# --- Explaining what pydantic found ------------------------------------------------------------------


def _explain(document: Document, error: ErrorDetails) -> str:
    path = error["loc"]
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], document.value)
        return document.problem(path, f"unknown key{_suggest(str(path[-1]), known)}", at_key=True)
    if error["type"] == "unknown_choice":
        allowed = context["allowed"]
        given = error["input"]
        what = "missing" if given is None else f"unknown {path[-1]} {given!r}"
        return document.problem(path, f"{what}{_suggest(str(given), allowed)}")
    if error["type"] == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return document.problem(path, f"unknown value {error['input']!r}{_suggest(str(error['input']), allowed)}")
    if error["type"] == "missing":
        return document.problem(path, "missing, and it has no default")
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    given = error["input"]
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return document.problem(path, message[:1].lower() + message[1:] + shown)


def _suggest(given: str, allowed: Sequence[str]) -> str:
    close = get_close_matches(given, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(map(str, allowed))})" if allowed else hint


def _fields_at(path: Sequence[str | int], value: Any) -> list[str]:
    """The keys that the mapping at `path` may have."""
    model: Any = Manifest
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
            continue  # the model is that of the list's entries already
        if isinstance(model, type) and issubclass(model, Config):
            info = _field(model, str(part))
            if info is None:
                return []
            model = _config_in(info.annotation, info.metadata, value)
        else:  # a mapping of named configs: `stages`, `resources`
            model = _config_in(get_args(model)[1], (), value)
    if not (isinstance(model, type) and issubclass(model, Config)):
        return []
    return [info.alias or name for name, info in model.model_fields.items()]


def _keys(path: str) -> list[str | int]:
    """The parts of a dotted path; places in lists are numbers."""
    return [int(part) if part.isdigit() else part for part in path.split(".")]


def _field(model: type[Config], key: str) -> Any:
    return next((i for name, i in model.model_fields.items() if key in (name, i.alias)), None)


def _config_in(annotation: Any, metadata: Sequence[Any], value: Any) -> Any:
    """The Config class, or dict annotation, that a value of this field is validated against."""
    if getattr(annotation, "__origin__", None) is dict:
        return annotation
    inside = [m for part in (annotation, *get_args(annotation)) for m in getattr(part, "__metadata__", ())]
    for choice in (m for m in (*metadata, *inside) if isinstance(m, Choice)):
        return choice.of(value)
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), annotation)


# --- What only the whole manifest shows --------------------------------------------------------------


def is_artifact_path(reference: str) -> bool:
    """References to sealed artifacts are told from stage names by their slash."""
    return "/" in reference


def _check_references(manifest: Manifest, document: Document) -> Iterator[str]:
    for name, stage in manifest.stages.items():
        for field in marked(stage, Input):
            reference, wanted = field.value, field.marker
            path = ("stages", name, *_keys(field.path))
            if is_artifact_path(reference):
                continue
            target = manifest.stages.get(reference)
            if target is None:
                fitting = [other for other, s in manifest.stages.items() if s.kind == wanted.kind]
                yield document.problem(
                    path,
                    f"there is no stage {reference!r}{_suggest(reference, fitting)}; "
                    f"give a stage of kind {wanted.kind}, or the path of a sealed artifact",
                )
            elif target.kind != wanted.kind:
                yield document.problem(path, f"needs a stage of kind {wanted.kind}; {reference!r} is a {target.kind}")


def _check_resources(manifest: Manifest, document: Document) -> Iterator[str]:
    for name, resources in manifest.resources.items():
        path = ("resources", name)
        if name not in manifest.stages:
            hint = _suggest(name, list(manifest.stages))
            yield document.problem(path, f"there is no such stage{hint}", at_key=True)
        elif resources.workers > 1 and not manifest.stages[name].PARALLEL:
            kind = manifest.stages[name].kind
            yield document.problem((*path, "workers"), f"a stage of kind {kind} runs on one worker")


def _order(manifest: Manifest, document: Document, problems: list[str]) -> list[str]:
    """Stages in an order in which each comes after its inputs, as near to the manifest's as can be."""
    order: list[str] = []
    open_stages: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in open_stages:
            cycle = " -> ".join([*open_stages[open_stages.index(name) :], name])
            problems.append(document.problem(("stages", name), f"a cycle: {cycle}", at_key=True))
            return
        open_stages.append(name)
        for field in marked(manifest.stages[name], Input):
            if field.value in manifest.stages:
                visit(field.value)
        open_stages.pop()
        order.append(name)

    for name in manifest.stages:
        visit(name)
    return order


def _absolute(manifest: Manifest) -> Manifest:
    """Paths made absolute, so that a run can be resumed from any folder."""
    stages: dict[str, Stage] = {}
    for name, stage in manifest.stages.items():
        paths: dict[str, str] = {}
        for field in marked(stage, Content):
            local = field.value.startswith((".", "/", "~")) or Path(field.value).exists()
            if local or field.marker.revision_field is None:
                paths[field.path] = _full(field.value)
        for field in marked(stage, Input):
            if is_artifact_path(field.value):
                paths[field.path] = _full(field.value)
        stages[name] = replaced(stage, paths)
    store = manifest.store if is_url(manifest.store) else _full(manifest.store)
    return manifest.model_copy(update={"stages": stages, "store": store})


def _full(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def inputs_of(stage: Stage) -> Mapping[str, str]:
    """Path of the field -> stage name or artifact path."""
    return {field.path: field.value for field in marked(stage, Input)}
