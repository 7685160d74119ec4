"""What a stage is, and what it may ask of whoever runs it.

A stage is a function from (its settings, sealed inputs, a seed) to a folder. Its class is both the
settings, as a pydantic model that the manifest is validated against, and the function, as `run`.
This module, and every module that defines a stage, imports no torch: planning must stay instant.
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

LARGEST_SEED = 2**63 - 1
"""What random number generators take."""


class StageError(Exception):
    """A stage cannot go on, for a reason its user can act on. Its message is all that is printed;
    it is never retried, because it would happen again."""


# --- Markers: what the planner must know about a field, written where the field is declared ----------


@dataclass(frozen=True)
class Input:
    """The field names another stage of the manifest, or the path of a sealed artifact, of this kind."""

    kind: str


@dataclass(frozen=True)
class Content:
    """The field may name a file, a folder or a hub repository: it enters the fingerprint by content.

    A field that may name a hub repository, `owner/name`, says which field beside it holds the revision; one that
    does not may be a glob.
    """

    revision_field: str | None = None
    files: tuple[str, ...] = ("**/*",)
    """Of a folder, the patterns of what is read, and so of what counts."""
    shipped: Mapping[str, Path] = field(default_factory=dict, hash=False)
    """Folders of this installation, by the names that stand for them. Settings keep the name: installations move."""

    def source(self, value: str) -> str:
        """The path or hub repository that a value of the field stands for, here and now."""
        return str(self.shipped.get(value, value))


@dataclass(frozen=True)
class Neutral:
    """The field was added after artifacts existed: at its default it leaves fingerprints unchanged."""


@dataclass(frozen=True)
class Extent:
    """The field says how much, not what: it is left out of the identity of the pool of parts."""


class Config(BaseModel):
    """A part of the manifest: immutable, strictly typed, refusing keys that it does not know."""

    VERSION: ClassVar[int] = 1
    """Raised when the same settings come to give other results; above 1 it enters the identity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )


class Execution(Config):
    """How a stage is carried out. Recorded in what it makes, and never a reason to make it again."""

    threads: int | None = Field(None, ge=1, description="CPU threads a worker; default: cores over workers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")


@dataclass(frozen=True)
class Link:
    """A stage of a chain, as it would be written by hand; `label` is a number: student/16."""

    label: str
    settings: dict[str, Any]
    """Not validated."""
    previous: str
    """The field that names the link before it; of the first link it is left as it is."""
    origins: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """Of settings that stand elsewhere in the chain's: path here -> path there."""


class Stage(Config):
    """Base of all stage kinds. VERSION is raised when the same settings come to give other results."""

    VERSION: ClassVar[int]
    PARALLEL: ClassVar[bool] = False
    """Whether its work is spread over several workers, with `map`."""
    kind: str
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="default: the manifest's seed")
    execution: Execution = Field(Execution(), description="how it is carried out; makes nothing stale")

    @classmethod
    def chain(cls, settings: Mapping[str, Any]) -> Sequence[Link]:
        """The stages that one with these settings, not validated yet, stands for, in order; none: it is one stage, or
        makes no sense, which validation will say."""
        return []

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that contradicts the stages it reads."""
        yield from ()

    def warnings(self, inputs: Mapping[str, Artifact]) -> Iterator[str]:
        """Yield what the user should know before it runs, as far as a quick look at the settings and inputs shows."""
        yield from ()

    def damage(self, folder: Path) -> str | None:
        """What is missing of the sealed `folder`, if it relies on files outside of it; None if nothing is. Reads no
        more than their sizes."""
        return None

    def parts(self, folder: Path) -> Mapping[str, str]:
        """The files of the pool that the sealed `folder` lists: path below the pool -> sha256. Raises StageError."""
        return {}

    def damaged_parts(self, folder: Path) -> Mapping[str, str]:
        """Path below the pool -> what is wrong with it. Reads and hashes every part. Raises StageError."""
        return {}

    def discard(self, pool: Path, parts: Sequence[str]) -> None:
        """Remove parts from the pool. A part that is half removed when the process dies does not exist."""

    def progress_in(self, work: Path, pool: Path) -> str | None:
        """What an interrupted attempt left that a new one will go on from, in words; None if nothing."""
        return None

    def run(self, context: StageContext) -> Mapping[str, Any]:
        """Fill `context.output`; return figures for the artifact's record. Raises StageError."""
        raise TypeError(f"{type(self).__name__} does not say how it runs")


@dataclass(frozen=True)
class Artifact:
    """What a stage came to, or will come to: its folder holds `artifact.json` if and only if it is sealed."""

    stage: Stage
    fingerprint: str
    folder: Path
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    seed: int = 0

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def record(self) -> dict[str, Any]:
        """The sealed record: config, inputs, versions, device, seconds, counts, hashes, metrics."""
        record: dict[str, Any] = json.loads((self.folder / "artifact.json").read_text(encoding="utf-8"))
        return record

    @property
    def sha256(self) -> str:
        """Hash of the names and hashes of the sealed files: it tells results apart that share a fingerprint, such as
        those of two GPUs. Raises OSError, ValueError or KeyError if there is no record."""
        files = json.dumps(self.record["files"], sort_keys=True)
        return hashlib.sha256(files.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s are finished; `figures` are the numbers to show and to log beside it."""

    done: int
    total: int
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)


class StageContext(Protocol):
    """What a stage may ask for. It never learns who gives it: Ray, or the same process."""

    inputs: Mapping[str, Artifact]
    fingerprint: str
    seed: int
    contents: Mapping[str, str]
    """What each `Content` field was found to hold when the plan was made: dotted path -> identity."""
    output: Path
    """The folder to fill. It survives a kill: a stage finds there what its last attempt left. What lies in its
    folder SCRATCH is for the stage alone, and is dropped when the artifact is sealed; so are hidden files."""
    pool: Path
    """A folder shared by all artifacts that differ only in `Extent` fields: finished parts live there."""
    threads: int
    """CPU threads that each worker may use."""

    def map(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Run `make_worker()(item)` for each item on a pool of workers, which keep what they made.
        Results come in the order of completion. Lost workers are replaced and their items tried again,
        a bounded number of times; then StageError names the item."""

    def run(self, function: Callable[..., Generator[Progress, None, Result]], *arguments: Any) -> Result:
        """Run a generator function on one worker, passing on the progress it yields; return its result."""

    def progress(self, progress: Progress) -> None:
        """Show and log how far the stage is."""

    def warn(self, text: str) -> None:
        """Tell the user something, on the terminal and in the stage's log."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Annotates a field whose settings' class is `registry[value[key]]`; a bare word means `{key: word}`.

    A registry instead of a union of types, so that another package may add an entry. One that cannot be used is a
    problem of the manifest that names it.
    """

    key: str
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
        """The class that `value`, not yet validated, asks for; None if nobody offers it. Raises PluginError."""
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
            raise PydanticCustomError("dict_type", "a mapping is needed here")
        given = value.get(self.key) if isinstance(value, Mapping) else value
        raise self._refused(PydanticCustomError("unknown_choice", "unknown", {"allowed": sorted(self.registry)}), given)

    def _refused(self, error: PydanticCustomError, given: Any) -> ValidationError:
        return ValidationError.from_exception_data(self.key, [{"type": error, "loc": (self.key,), "input": given}])


def below(values: Mapping[str, Result], field: str) -> dict[str, Result]:
    """Of values by dotted path, those that stand in the settings of `field`, by their path there."""
    return {path.removeprefix(f"{field}."): value for path, value in values.items() if path.startswith(f"{field}.")}
