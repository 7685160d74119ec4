"""The stage interface: settings, inputs, artifacts, and the context in which a stage runs.

A stage is a function of (settings, sealed inputs, seed) that fills a folder. Its class is a pydantic model of the
settings, and its method `run` is the function. This module and all modules that define stages import no torch, so that
planning stays fast.

Terms:

- artifact: the folder that a stage fills. It is sealed when it is finished: it then holds `artifact.json`, which lists
  the hash of every file.
- fingerprint: the hash of everything that decides a stage's result. An artifact is stored under its fingerprint.
- stale: an artifact is stale if the manifest now gives its stage another fingerprint, or if an input was made again
  with different bytes. The stage is then run again.
- part: a file that a stage finishes on its own, such as a shard of pairs. Parts lie in a pool, a folder that several
  artifacts may share.
- chain: a stage of a manifest that stands for several stages, its links. Each link reads the link before it.
- hub: the Hugging Face Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from stages.registry import PluginError

Item = TypeVar("Item")
Result = TypeVar("Result")


SCRATCH = "checkpoints"
"""The subfolder of a stage's output for checkpoints and other temporary files. Sealing removes it."""

LARGEST_SEED = 2**63 - 1
"""The largest seed that a manifest may give: the largest signed 64-bit integer."""


class StageError(Exception):
    """A problem that the user can act on. Only the message is printed. The stage is not retried."""


# --- Markers: annotations of a field that the planner reads -----------------------------------------


@dataclass(frozen=True)
class Input:
    """Marks a field that refers to a stage of this kind by name, or to a sealed artifact of this kind by path."""

    kind: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "format": f"a stage of kind {self.kind}, or the path of such an artifact"}


@dataclass(frozen=True)
class Content:
    """Marks a field that names a file, a folder or a hub repository.

    The fingerprint depends on the content (the sha256 of the files, or the commit of the repository), not on the name.
    """

    revision_field: str | None = None
    """The name of the field, in the same class, that holds the hub revision. If given, the value may be a hub
    repository `owner/name`. If None, the value is a path or a glob."""
    files: tuple[str, ...] | Callable[[str], tuple[str, ...]] = ("**/*",)
    """Glob patterns of the files that the stage reads from a folder, or a function that returns them. Other files do
    not change the fingerprint."""
    shipped: Mapping[str, Path] = field(default_factory=dict, hash=False)
    """Short name -> folder that is installed with Retort. Settings store the name, because the path may change."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "format": "path or hub id" if self.revision_field else "path"}

    def source(self, value: str) -> str:
        """Return the path or hub repository that a value of the field refers to. Shipped names become paths."""
        return str(self.shipped.get(value, value))

    def patterns(self, source: str) -> tuple[str, ...]:
        """Return the patterns of the files that are read from a folder."""
        return self.files(source) if callable(self.files) else self.files


@dataclass(frozen=True)
class Neutral:
    """Marks a field that is newer than some artifacts.

    Fingerprints omit it while it has its default value, so that old artifacts stay valid.
    """


@dataclass(frozen=True)
class Extent:
    """Marks a field that changes the number of samples but not their values.

    The fingerprint of the pool omits it, so that a larger number of samples reuses the finished parts.
    """


class Config(BaseModel):
    """Base class of all settings: immutable and strictly typed. Unknown keys are errors."""

    VERSION: ClassVar[int] = 1
    """The version of the code behind these settings. Increase it if a change of the code changes results. Fingerprints
    contain it if it is above 1."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class Execution(Config):
    """How a stage is run. These settings are recorded with the artifact, but changing them makes nothing stale."""

    threads: int | None = Field(
        None, ge=1, description="CPU threads of each worker; default: number of cores / number of workers"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device that the stage computes on; auto uses a GPU if there is one"
    )


@dataclass(frozen=True)
class Link:
    """One stage of a chain, such as student/16 of the chain `student`."""

    label: str
    """The number in the stage's name: "16" in student/16."""
    settings: dict[str, Any]
    """The settings of this stage, unvalidated, in the form that they have in a manifest."""
    previous: str
    """The name of the field that refers to the link before this one. In the first link, the field keeps its value from
    the manifest."""
    origins: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """Path of a setting in this link -> its path in the chain's settings, where the two differ. Error messages use it
    to show the right line of the manifest."""


class Stage(Config):
    """Base class of all stage kinds."""

    VERSION: ClassVar[int]
    """The version of the stage's code. Increase it if a change of the code changes results. Fingerprints always contain
    it."""
    PARALLEL: ClassVar[bool] = False
    """Whether the stage can use several workers, through `StageContext.map`."""
    kind: str
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="seed of all random numbers of the stage; default: the manifest's seed"
    )
    execution: Execution = Field(Execution(), description="how the stage is run; changing it makes nothing stale")

    @classmethod
    def chain(cls, settings: Mapping[str, Any]) -> Sequence[Link]:
        """Return the links of the chain that these unvalidated settings describe, in order.

        The result is empty if the settings describe a single stage or are invalid. Validation reports errors later.
        """
        return []

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit the inputs."""
        yield from ()

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Yield warnings for the user before the stage runs. The checks must be fast."""
        yield from ()

    def damage(self, folder: Path) -> str | None:
        """Describe the damage to the parts of the sealed artifact in `folder`, or return None if there is none.

        This check must be fast: it looks for missing parts and for parts of another size, and hashes none. Raises
        StageError if the list of parts cannot be read."""
        return None

    def parts(self, folder: Path) -> Mapping[str, str]:
        """Return the parts of the sealed artifact in `folder`: path below the pool -> sha256.

        Raises StageError if the list of parts cannot be read."""
        return {}

    def damaged_parts(self, folder: Path) -> Mapping[str, str]:
        """Return the damaged parts of the sealed artifact in `folder`: path below the pool -> what is wrong.

        Every part is read and hashed. Raises StageError if the list of parts cannot be read."""
        return {}

    def discard(self, pool: Path, parts: Sequence[str]) -> None:
        """Remove `parts` from the pool. A part must count as missing if the process dies while it removes the part."""

    def progress_in(self, work: Path, pool: Path) -> str | None:
        """Describe the work of an interrupted attempt that a new attempt can continue, or return None if there is none.

        `work` is the output folder of the interrupted attempt. `pool` is the folder of parts."""
        return None

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Fill the folder `context.output`. Return metrics for the artifact's record.

        Raises StageError for problems that the user can act on."""
        raise TypeError(f"{type(self).__name__} does not implement run()")


@dataclass(frozen=True)
class Artifact:
    """The result of a stage, made or planned. It is sealed if its folder holds `artifact.json`."""

    stage: Stage
    fingerprint: str
    folder: Path
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    """The artifacts that the stage reads, by the dotted path of the field that names them."""
    seed: int = 0

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def record(self) -> dict[str, Any]:
        """The content of `artifact.json`: settings, inputs, versions, times, file hashes, metrics.

        Raises OSError or ValueError if it cannot be read."""
        record: dict[str, Any] = json.loads((self.folder / "artifact.json").read_text(encoding="utf-8"))
        return record

    @property
    def sha256(self) -> str:
        """The hash of the names and contents of the sealed files.

        Artifacts of one fingerprint have different hashes if their bytes differ, for example because two GPU models
        made them. Raises OSError, ValueError or KeyError if there is no valid record."""
        files = json.dumps(self.record["files"], sort_keys=True)
        return hashlib.sha256(files.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Progress:
    """The progress of a stage: `done` of `total` units are finished."""

    done: int
    total: int
    unit: str
    """The name of the units, in the plural: "steps", "pairs"."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Scalars to show and log with the progress, such as the loss."""


class StageContext(Protocol):
    """The interface that a running stage uses: its inputs, folders, workers and messages.

    The interface is the same wherever the workers run: in this process, or on Ray.
    """

    inputs: Mapping[str, Artifact]
    """The sealed inputs, by the dotted path of the field that names them."""
    fingerprint: str
    seed: int
    contents: Mapping[str, str]
    """Dotted path of each `Content` field -> identity of its content when the plan was made: `sha256:...` or
    `hub:COMMIT`."""
    output: Path
    """The folder to fill. Files of an interrupted attempt are still there. Sealing removes the subfolder SCRATCH and
    hidden files."""
    pool: Path
    """The folder of finished parts. Artifacts that differ only in `Extent` fields share it."""
    threads: int
    """The number of CPU threads that each worker may use."""

    def map(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Process the items on the stage's workers. Yield (item, result) in the order in which items finish.

        Each worker calls `work = make_worker()` once and then `work(item)` for each of its items. A lost worker is
        replaced. A failed item is retried a limited number of times. After that, StageError is raised, and its message
        names the item."""

    def run(self, function: Callable[..., Generator[Progress, None, Result]], *arguments: Any) -> Result:
        """Run a generator function on one worker, show the progress that it yields, and return its result.

        If the worker is lost, the function is called again. It must then continue from the files that it has written.
        """

    def progress(self, progress: Progress) -> None:
        """Show and log the progress of the stage."""

    def warn(self, text: str) -> None:
        """Write a warning to the terminal and to the stage's log."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Marks a field whose value names its class. `registry[value[key]]` validates the value.

    A bare word stands for `{key: word}`. The classes are in a registry instead of a union of types, so that other
    packages can add classes. If a class cannot be loaded, validation reports an error of the manifest.
    """

    key: str
    """The key that selects the class: "name" for methods and losses."""
    registry: Mapping[str, type[Config]]
    default: str | None = None
    """The name of the class that a mapping without the key selects."""

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(
            self._choose,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config, info: config.model_dump(
                    mode=info.mode, by_alias=info.by_alias, exclude_none=info.exclude_none
                ),
                info_arg=True,
            ),
        )

    def __get_pydantic_json_schema__(self, _schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON Schema: a word, or a mapping whose key selects its class.

        Mappings of classes that cannot be loaded are not checked. The schema uses if/then, not anyOf, so that an editor
        reports the wrong key of the selected class."""
        words, cases = {"enum": list(self.registry)}, []
        for name in self.registry:
            try:
                config = self.registry[name]
            except PluginError:
                continue
            required = [] if name == self.default else [self.key]
            chosen = {"properties": {self.key: {"const": name}}, "required": required}
            cases.append({"if": chosen, "then": handler(config.__pydantic_core_schema__)})
        required = [] if self.default else [self.key]
        mapping = {"type": "object", "properties": {self.key: words}, "required": required, "allOf": cases}
        return {"if": {"type": "string"}, "then": words, "else": mapping}

    def of(self, value: Any) -> type[Config] | None:
        """Return the class that the unvalidated `value` selects, or None if the name is unknown.

        Raises PluginError if the class cannot be loaded."""
        name = value.get(self.key, self.default) if isinstance(value, Mapping) else value
        return self.registry.get(name) if isinstance(name, str) else None

    def _choose(self, value: Any) -> Config:
        if isinstance(value, Config):
            return value
        try:
            chosen = self.of(value)
        except PluginError as error:
            raise self._refused(PydanticCustomError("plugin", "{reason}", {"reason": str(error)}), {}) from error
        if chosen is not None:
            return chosen.model_validate({self.key: value} if isinstance(value, str) else value)
        if not isinstance(value, Mapping | str):
            raise PydanticCustomError("dict_type", "should be a mapping")
        given = value.get(self.key) if isinstance(value, Mapping) else value
        raise self._refused(PydanticCustomError("unknown_choice", "unknown", {"allowed": sorted(self.registry)}), given)

    def _refused(self, error: PydanticCustomError, given: Any) -> ValidationError:
        return ValidationError.from_exception_data(self.key, [{"type": error, "loc": (self.key,), "input": given}])


def values_under(values: Mapping[str, Result], field: str) -> dict[str, Result]:
    """Select the values whose dotted path starts with `field`, and remove that prefix from their paths."""
    return {path.removeprefix(f"{field}."): value for path, value in values.items() if path.startswith(f"{field}.")}
