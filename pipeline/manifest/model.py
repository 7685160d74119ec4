"""The manifest as a class, and loading it: read, override, expand, validate. All problems are reported together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from pipeline import DEFAULT_STORE
from pipeline.errors import ManifestError, UsageError
from pipeline.manifest import document as yaml_document
from pipeline.manifest import matrix, references
from pipeline.manifest.document import Document
from pipeline.manifest.fields import is_artifact_path, marked, parts_of, plain, replaced
from pipeline.manifest.matrix import groups_of
from pipeline.manifest.problems import by_place, describe
from pipeline.store.artifacts import is_url
from stages import KINDS
from stages.base import LARGEST_SEED, Choice, Config, Content, Input, Stage

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,79}$"
MEMBER = NAME.removesuffix("$") + r"(/[0-9]{1,6})*(\[[A-Za-z0-9_.=,+-]+\])?$"
"""The name of a stage, of a link of its chain, or of a member of its matrix: `student/16[loss=l1,seed=2]`."""

StageName = Annotated[str, StringConstraints(pattern=MEMBER)]


class Resources(Config):
    """The number of workers of a stage, and the GPUs of each. They are never part of a fingerprint."""

    workers: int = Field(1, ge=1, description="number of worker processes, in the cluster or on this machine")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of each worker; below 1, workers share a GPU")


class Manifest(Config):
    """One pipeline: its stages, and where their artifacts are kept."""

    name: Annotated[str, StringConstraints(pattern=NAME)] = Field(description="name of the run")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of each stage that has none of its own")
    store: str = Field(DEFAULT_STORE, description="folder of artifacts and runs; on a cluster, a shared folder")
    stages: dict[StageName, Annotated[Stage, Choice("kind", KINDS)]] = Field(
        min_length=1, description="the stages, by names of your choice; stages refer to each other by these names"
    )
    resources: dict[str, Resources] = Field(
        default_factory=dict, description="workers and GPUs of each stage; a change makes no stage stale"
    )

    def seed_of(self, stage: str) -> int:
        """The stage's own seed, or else the manifest's."""
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def resources_of(self, stage: str) -> Resources:
        """The most specific match, or else the defaults. For `student/16[seed=2]`, the order is `student/16[seed=2]`,
        `student[seed=2]`, `student/16`, `student`."""
        names = [stage, *sorted(groups_of(stage), key=lambda name: ("[" in name, "/" in name), reverse=True)]
        return next((self.resources[name] for name in names if name in self.resources), Resources())


@dataclass(frozen=True)
class Loaded:
    """A validated manifest, with the text that it came from: later problems are reported at their place in the text."""

    manifest: Manifest
    document: Document
    order: list[str]
    """Names of stages, each after the stages that it reads."""
    problems: Sequence[str] = ()
    """The problems found so far. A stage with problems is not in `order`. A stage whose own settings are invalid is not
    in `manifest` either. Planning checks the other stages and then reports all problems together."""

    def problem(self, stage: str, field: str, message: str) -> str:
        """Return `message` with the place of a stage's field (a dotted path) in the text."""
        return self.document.problem(("stages", stage, *parts_of(field)), message)


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and validate a manifest; `overrides` are --set texts, PATH=VALUE.

    Raises ManifestError with every problem found, and UsageError for a file that cannot be read.
    """
    return loads(_read(path), str(path), overrides)


def loads(text: str, name: str, overrides: Sequence[str] = ()) -> Loaded:
    """Like `load`, but from a text. `name` is the file name in messages."""
    loaded = _examine(text, name, overrides)
    if loaded.problems:
        raise ManifestError(loaded.problems)
    return loaded


def examine(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Like `load`, but problems of stages are returned in `Loaded.problems`. Planning adds those that it finds and
    raises all of them together."""
    return _examine(_read(path), str(path), overrides)


def name_and_store(path: Path) -> tuple[str, str]:
    """The run name and the store of a manifest. Other problems of the manifest are ignored."""
    document = yaml_document.parse(_read(path), str(path))
    name, store = document.value.get("name"), document.value.get("store", DEFAULT_STORE)
    if not isinstance(name, str) or not isinstance(store, str):
        text = "missing or not text; give the run a name, such as `name: digits`"
        raise ManifestError([document.problem(("name",), text)])
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


def _examine(text: str, name: str, overrides: Sequence[str]) -> Loaded:
    document = yaml_document.parse(text, name)
    for override in overrides:
        document.set(override)
    unexpanded = document.value.get("stages")
    coordinates = matrix.expand(document)
    manifest = _validated(document)
    references.check_cycles(manifest.stages, document)
    stages = matrix.expand_readers(manifest.stages, coordinates, document)
    manifest = manifest.model_copy(update={"stages": stages})
    known = {*manifest.stages, *(group for name in manifest.stages for group in groups_of(name))}
    invalid = {name for name in (*unexpanded, *document.value["stages"]) if name not in known}
    order = references.order(manifest.stages, references.check(manifest.stages, invalid, document))
    references.check_resources(manifest.stages, invalid, manifest.resources, document)
    return Loaded(_absolute(manifest), document, order, by_place(document.problems))


def _validated(document: Document) -> Manifest:
    """Validate, leaving out the stages and resources that are invalid. Their problems are reported.

    Raises ManifestError if nothing else can be checked.
    """
    value = document.value
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
    document.problems += [describe(Manifest, document, e) for e in found]
    wrong = {e["loc"][:2] for e in found}
    kept: dict[str, Any] = {"name": "manifest"} | {k: v for k, v in value.items() if (k,) not in {w[:1] for w in wrong}}
    for section in ("stages", "resources"):
        if isinstance(value.get(section), dict) and (section,) not in wrong:
            kept[section] = {k: v for k, v in value[section].items() if (section, k) not in wrong}
    try:
        return Manifest.model_validate(kept)
    except ValidationError:
        raise ManifestError(list(dict.fromkeys(document.problems))) from None


def dump(manifest: Manifest) -> str:
    """The resolved manifest as YAML. `loads` reads back an equal manifest."""
    return yaml_document.dump(plain(manifest))


def _absolute(manifest: Manifest) -> Manifest:
    """Make all paths absolute, so that a run can be resumed from any folder."""
    stages: dict[str, Stage] = {}
    for name, stage in manifest.stages.items():
        paths = [field for field in marked(stage, Input) if is_artifact_path(field.value)]
        for field in marked(stage, Content):
            local = field.value.startswith((".", "/", "~")) or os.path.exists(field.value)
            if field.value not in field.marker.shipped and (local or field.marker.revision_field is None):
                paths.append(field)
        stages[name] = replaced(stage, {field.path: _full(field.value) for field in paths})
    store = manifest.store if is_url(manifest.store) else _full(manifest.store)
    return manifest.model_copy(update={"stages": stages, "store": store})


def _full(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())
