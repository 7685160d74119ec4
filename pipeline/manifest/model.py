"""A manifest: read, overridden, expanded, validated whole. Every error says file, line, column, path and problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from pipeline import DEFAULT_STORE
from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import chain, matrix, references
from pipeline.manifest import document as yaml_document
from pipeline.manifest.document import Document
from pipeline.manifest.fields import is_artifact_path, marked, parts_of, plain, replaced
from pipeline.manifest.matrix import groups_of
from pipeline.manifest.problems import in_order, in_words
from pipeline.store.artifacts import is_url
from stages import KINDS
from stages.base import LARGEST_SEED, Choice, Config, Content, Input, Stage

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$"
MEMBER = NAME.removesuffix("$") + r"(/[0-9]{1,6})*(\[[A-Za-z0-9_.=,+-]+\])?$"
"""A stage's name, or that of one link of its chain, or member of its matrix: `student/16[loss=l1,seed=2]`."""

StageName = Annotated[str, StringConstraints(pattern=MEMBER)]


class Resources(Config):
    """What each worker of a stage gets. Never part of a fingerprint."""

    workers: int = Field(1, ge=1, description="processes, of the cluster or of this machine")
    gpus_per_worker: float = Field(0.0, ge=0, description="below 1: workers share a GPU")


class Manifest(Config):
    """One pipeline: its stages, and where their artifacts are kept."""

    name: Annotated[str, StringConstraints(pattern=NAME)] = Field(description="of the run")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of every stage without a seed of its own")
    store: str = Field(DEFAULT_STORE, description="the folder for artifacts and runs; on a cluster, a shared one")
    stages: dict[StageName, Annotated[Stage, Choice("kind", KINDS)]] = Field(
        min_length=1, description="by a name of your choice, by which other stages refer to them"
    )
    resources: dict[str, Resources] = Field(
        default_factory=dict, description="by stage: what its workers get; makes nothing stale"
    )

    def seed_of(self, stage: str) -> int:
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def resources_of(self, stage: str) -> Resources:
        """What was given for it; else for all links of its member, its link of all members, or all of them."""
        names = [stage, *sorted(groups_of(stage), key=lambda name: ("[" in name, "/" in name), reverse=True)]
        return next((self.resources[name] for name in names if name in self.resources), Resources())


@dataclass(frozen=True)
class Loaded:
    """A manifest, and the text it came from, for problems that show up later."""

    manifest: Manifest
    document: Document
    order: list[str]
    """Names of stages, each after the stages that it reads."""
    problems: Sequence[str] = ()
    """What is wrong so far. Stages that are affected stand neither in `order` nor, if they are not valid in
    themselves, in the manifest: the others can still be looked at, so that all problems are told at once."""

    def problem(self, stage: str, field: str, message: str) -> str:
        return self.document.problem(("stages", stage, *parts_of(field)), message)


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and validate. Raises ManifestError with every problem found, UsageError for an unreadable file."""
    return _sound(examine(path, overrides))


def loads(text: str, name: str, overrides: Sequence[str] = ()) -> Loaded:
    """As `load`, from a text; `name` is what errors call it."""
    return _sound(_examine(text, name, overrides))


def examine(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """As `load`, but problems of stages are kept in the result, for planning to add its own and raise them all."""
    return _examine(_read(path), str(path), overrides)


def name_and_store(path: Path) -> tuple[str, str]:
    """What a manifest calls its run, and where it keeps it, whatever else is wrong with it."""
    document = yaml_document.parse(_read(path), str(path))
    name, store = (document.value.get(key, default) for key, default in (("name", None), ("store", DEFAULT_STORE)))
    if not isinstance(name, str) or not isinstance(store, str):
        raise ManifestError([document.problem(("name",), "a manifest names its run")])
    return name, store


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        raise ManifestError([f"{path}:{line}:{column}: not UTF-8"]) from None


def _sound(loaded: Loaded) -> Loaded:
    if loaded.problems:
        raise ManifestError(loaded.problems)
    return loaded


def _examine(text: str, name: str, overrides: Sequence[str]) -> Loaded:
    document = yaml_document.parse(text, name)
    for override in overrides:
        document.set(override)
    problems: list[str] = []
    asked = document.value.get("stages")
    coordinates = chain.expand(document, matrix.expand(document, problems), problems)
    manifest = _validated(document, problems)
    problems += references.cycles(manifest.stages, document)
    stages = matrix.follow(manifest.stages, coordinates, document, problems)
    manifest = manifest.model_copy(update={"stages": stages})
    there = {*manifest.stages, *(group for name in manifest.stages for group in groups_of(name))}
    lost = {name for name in (*asked, *document.value["stages"]) if name not in there}
    found = references.wrong(manifest.stages, lost, document)
    problems += [problem for several in found.values() for problem in several]
    problems += references.wrong_resources(manifest.stages, lost, manifest.resources, document)
    order = references.order(manifest.stages, set(found))
    return Loaded(_absolute(manifest), document, order, in_order(problems))


def _validated(document: Document, problems: list[str]) -> Manifest:
    """The manifest, less the stages and resources that are not valid; what is wrong with them goes to `problems`.

    Raises ManifestError if nothing can be said of the stages.
    """
    value = document.value
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
    problems += [in_words(Manifest, document, e) for e in found]
    wrong = {e["loc"][:2] for e in found}
    left: dict[str, Any] = {"name": "manifest"} | {k: v for k, v in value.items() if (k,) not in {w[:1] for w in wrong}}
    for section in ("stages", "resources"):
        if isinstance(value.get(section), dict) and (section,) not in wrong:
            left[section] = {k: v for k, v in value[section].items() if (section, k) not in wrong}
    try:
        return Manifest.model_validate(left)
    except ValidationError:
        raise ManifestError(list(dict.fromkeys(problems))) from None


def dump(manifest: Manifest) -> str:
    """The resolved manifest as YAML that `loads` reads back to an equal one."""
    return yaml_document.dump(plain(manifest))


def _absolute(manifest: Manifest) -> Manifest:
    """Paths made absolute, so that a run can be resumed from any folder."""
    stages: dict[str, Stage] = {}
    for name, stage in manifest.stages.items():
        paths: dict[str, str] = {}
        for field in marked(stage, Content):
            if field.value in field.marker.shipped:
                continue
            local = field.value.startswith((".", "/", "~")) or _exists(field.value)
            if local or field.marker.revision_field is None:
                paths[field.path] = _full(field.value)
        for field in marked(stage, Input):
            if is_artifact_path(field.value):
                paths[field.path] = _full(field.value)
        stages[name] = replaced(stage, paths)
    store = manifest.store if is_url(manifest.store) else _full(manifest.store)
    return manifest.model_copy(update={"stages": stages, "store": store})


def _full(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # ~somebody, whom this machine does not know
        return str(Path(path).absolute())


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that no file can have
        return False
