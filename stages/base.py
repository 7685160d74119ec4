"""The stage interface: settings, inputs, artifacts, and the context that a stage runs in.

A stage is a function of (settings, sealed inputs, seed) that fills a folder. Its class is a pydantic model of the
settings, and its method `run` is the function. This module and all modules that define stages import no torch, so that
planning stays fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from stages.registry import PluginError

Item = TypeVar("Item")
Result = TypeVar("Result")


SCRATCH = "checkpoints"
"""A folder below a stage's output for its private files. It is removed when the artifact is sealed."""

LARGEST_SEED = 2**63 - 1
"""The largest seed that the random number generators accept."""


class StageError(Exception):
    """A problem that the user can act on. Only the message is printed. The stage is not retried."""


# --- Markers: annotations of a field that the planner reads -----------------------------------------


@dataclass(frozen=True)
class Input:
    """The field names a stage of this kind in the manifest, or the path of a sealed artifact of this kind."""

    kind: str


@dataclass(frozen=True)
class Content:
    """The field names a file, a folder or a hub repository. Its content enters the fingerprint, not its name."""

    revision_field: str | None = None
    """The neighbouring field that holds the hub revision. If given, the value may be a hub repository `owner/name`.
    If None, the value is a path and may be a glob."""
    files: tuple[str, ...] = ("**/*",)
    """Patterns of the files that are read from a folder. Only these enter the fingerprint."""
    shipped: Mapping[str, Path] = field(default_factory=dict, hash=False)
    """Short names of folders that are installed with Retort. Settings keep the name, because the path may change."""

    def source(self, value: str) -> str:
        """Return the path or hub repository for a value of the field. Shipped names become paths."""
        return str(self.shipped.get(value, value))


@dataclass(frozen=True)
class Neutral:
    """The field was added later. At its default value it is left out of fingerprints, so old artifacts stay valid."""


@dataclass(frozen=True)
class Extent:
    """The field changes how many samples there are, not their values. It is left out of the pool's hash."""


class Config(BaseModel):
    """Base class of all settings: immutable and strictly typed. Unknown keys are errors."""

    VERSION: ClassVar[int] = 1
    """Raise it when the same settings give different results. It enters the fingerprint if it is above 1."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class Execution(Config):
    """How a stage is run. These settings are recorded with the artifact, but changing them makes nothing stale."""

    threads: int | None = Field(
        None, ge=1, description="CPU threads of each worker; default: the cores divided by the workers"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device that the stage computes on; auto uses a GPU if there is one"
    )


@dataclass(frozen=True)
class Link:
    """One stage of a chain, such as student/16 of the chain student."""

    label: str
    """The number in the stage's name: "16" in student/16."""
    settings: dict[str, Any]
    """The settings of this stage, as in a manifest. Not validated."""
    previous: str
    """The field that names the link before this one. The first link keeps the value from the manifest."""
    origins: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """Where settings of this link stand in the chain's settings: path in the link -> path in the chain. Only for
    settings that have moved. Error messages use it to show the right line."""


class Stage(Config):
    """Base class of all stage kinds."""

    VERSION: ClassVar[int]
    """Raise it when the same settings give different results. It always enters the fingerprint."""
    PARALLEL: ClassVar[bool] = False
    """Whether the stage uses several workers, through `StageContext.map`."""
    kind: str
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="seed of all random numbers of the stage; default: the manifest's seed"
    )
    execution: Execution = Field(Execution(), description="how the stage is run; changing it makes nothing stale")

    @classmethod
    def chain(cls, settings: Mapping[str, Any]) -> Sequence[Link]:
        """Return the links of the chain that these unvalidated settings describe, in order.

        The result is empty if the settings describe a single stage, or are invalid. Validation reports errors later.
        """
        return []

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit the inputs."""
        yield from ()

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Yield warnings for the user before the stage runs. Only quick checks belong here."""
        yield from ()

    def damage(self, folder: Path) -> str | None:
        """Describe files outside the sealed `folder` that the artifact needs and that are missing or changed.

        Returns None if there are none. This check must be fast: it compares sizes and does not hash files."""
        return None

    def parts(self, folder: Path) -> Mapping[str, str]:
        """Return the pool's files that the sealed `folder` lists: path below the pool -> sha256.

        Raises StageError if the list cannot be read."""
        return {}

    def damaged_parts(self, folder: Path) -> Mapping[str, str]:
        """Return the damaged files of the pool: path below the pool -> what is wrong.

        Every part is read and hashed. Raises StageError if the list of parts cannot be read."""
        return {}

    def discard(self, pool: Path, parts: Sequence[str]) -> None:
        """Remove parts from the pool. If the process dies midway, a half-removed part counts as removed."""

    def progress_in(self, work: Path, pool: Path) -> str | None:
        """Describe the progress of an interrupted attempt that a new attempt resumes from, or return None."""
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
        """Hash of the names and contents of the sealed files.

        It differs between results that share a fingerprint but not their bytes, for example from two GPU models.
        Raises OSError, ValueError or KeyError if there is no valid record."""
        files = json.dumps(self.record["files"], sort_keys=True)
        return hashlib.sha256(files.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` units."""

    done: int
    total: int
    unit: str
    """What is counted, in the plural: "steps", "pairs"."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers to show and log with the progress, such as the loss."""


class StageContext(Protocol):
    """What a running stage can use. It is the same on every engine."""

    inputs: Mapping[str, Artifact]
    """The sealed inputs, by the dotted path of the field that names them."""
    fingerprint: str
    seed: int
    contents: Mapping[str, str]
    """The identity of each `Content` field when the plan was made: dotted path -> `sha256:...` or `hub:COMMIT`."""
    output: Path
    """The folder to fill. It keeps what an interrupted attempt has written. Its subfolder SCRATCH and hidden files are
    removed when the artifact is sealed."""
    pool: Path
    """The folder of finished parts. All artifacts that differ only in `Extent` fields share it."""
    threads: int
    """The number of CPU threads that each worker may use."""

    def map(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Call `make_worker()(item)` for each item on a pool of workers. Yield (item, result) as items finish.

        A worker calls `make_worker` once and keeps the result. A lost worker is replaced. A failed item is tried again
        a limited number of times. Then StageError is raised, with the item in its message."""

    def run(self, function: Callable[..., Generator[Progress, None, Result]], *arguments: Any) -> Result:
        """Run a generator function on one worker and return its result. The progress that it yields is shown.

        If the worker is lost, the function is called again. It must resume from its files."""

    def progress(self, progress: Progress) -> None:
        """Show and log the progress of the stage."""

    def warn(self, text: str) -> None:
        """Write a warning to the terminal and to the stage's log."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Marks a field whose value is validated by the class `registry[value[key]]`. A bare word means `{key: word}`.

    A registry is used instead of a union of types, so that other packages can add classes. A class that cannot be
    loaded is reported as an error of the manifest that names it.
    """

    key: str
    """The key that selects the class: "name" for methods and losses."""
    registry: Mapping[str, type[Config]]

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

    def of(self, value: Any) -> type[Config] | None:
        """Return the class that the unvalidated `value` selects, or None if the name is unknown.

        Raises PluginError if the class cannot be loaded."""
        name = value.get(self.key) if isinstance(value, Mapping) else value
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
