"""The store: sealed artifacts, work in progress, pools of parts, locks and runs.

STORE/KIND/FINGERPRINT/      a sealed artifact; its artifact.json is written last
STORE/KIND/pool/FINGERPRINT/ a pool of parts, such as shards; several artifacts of a kind may share it
STORE/work/KIND-FINGERPRINT/ the files of an unfinished attempt
STORE/locks/                 a file for each artifact and pool, locked while that is being made
STORE/runs/NAME/             a run; see runs/run.py
STORE/contents.json          cached hashes of files
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UsageError
from stages import KINDS
from stages.base import SCRATCH, Artifact, StageError
from stages.data.files import fsync_folder, is_temporary, sha256_of, write_atomically
from stages.registry import PluginError

RECORD = "artifact.json"
"""The file that seals an artifact: settings, inputs, versions, times, file hashes, metrics."""
UNSEALED = "unsealed.json"
"""The file that holds the record while the artifact is being repaired or made again."""
INPUT_HASHES = ".inputs.json"
"""The file in a work folder that holds the sha256 of each input of the attempt."""
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""The exceptions that reading a damaged record can raise."""
NOT_INSTALLED = "which no installed package offers; install the package that it was made with"


def is_url(root: Path | str) -> bool:
    """Whether the location of a store is a URL, such as s3://BUCKET/PREFIX, instead of a path."""
    return "://" in str(root)


class Store:
    """A store in the folder `root`. All nodes of a cluster must share the folder. Raises UsageError for a URL."""

    def __init__(self, root: Path | str) -> None:
        if is_url(root):
            raise UsageError(
                f"store {root}: this version keeps its store in a folder; give its path (a cluster needs a shared one)"
            )
        self.root = Path(root).expanduser().absolute()

    def folder(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / fingerprint

    def pool(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / "pool" / fingerprint

    def work(self, artifact: Artifact) -> Path:
        """The folder in which an attempt makes the artifact."""
        return self.root / "work" / f"{artifact.kind}-{artifact.fingerprint}"

    def create(self) -> None:
        """Create the store's folders. Raises UsageError if they are not writable."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in ("work", "locks", "runs"):
                (self.root / name).mkdir(exist_ok=True)
            probe = self.root / "work" / f".{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"store {self.root} cannot be written: {error.strerror}; give another with --store"
            ) from None

    @property
    def hashes(self) -> Path:
        """The file of cached hashes."""
        return self.root / "contents.json"

    # --- Artifacts ---

    def is_sealed(self, artifact: Artifact) -> bool:
        """Whether the artifact has its record, artifact.json. It is then finished."""
        return (artifact.folder / RECORD).exists()

    def damage(self, artifact: Artifact) -> str | None:
        """Return None if the artifact can be reused, "" if it is not sealed, and otherwise a text that says why not.

        A sealed one cannot be reused if a file is missing or has another size, or if an input was made again with
        different bytes. This method hashes no file. Runs hash the files of all inputs before a stage starts, and
        `retort verify` hashes the files of an artifact.
        """
        if not self.is_sealed(artifact):
            return ""
        try:
            record = artifact.record
            if changed := next(changed_files(artifact.folder, record), None):
                return f"{changed} is missing or changed"
            if remade := remade_input(artifact, record):
                return f"its input {remade} was made again with different bytes"
        except READ_ERRORS:
            return f"its {RECORD} cannot be read"
        try:
            return artifact.stage.damage(artifact.folder)
        except StageError as error:
            return str(error)

    def seal(self, artifact: Artifact, work: Path, record: Mapping[str, Any]) -> None:
        """Turn the folder `work` into the artifact: hash its files, write the record, and move it into the store."""
        files = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != RECORD and not _is_scratch(path.relative_to(work))
        }
        text = json.dumps({**record, "files": files}, indent=2, ensure_ascii=False) + "\n"
        fsync_folder(work)
        write_atomically(work / RECORD, text.encode("utf-8"))
        self.finish(artifact.folder, work)

    def finish(self, folder: Path, work: Path) -> None:
        """Do the last step of sealing, which can be repeated: remove temporary files from `work`, and move it."""
        for path in list(work.rglob("*")):
            if _is_scratch(path.relative_to(work)):
                _remove(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        old = work.with_name(f"{work.name}-old")
        if folder.exists():  # a damaged artifact, which this one replaces
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        work.replace(folder)
        shutil.rmtree(old, ignore_errors=True)

    def outdated(self, artifact: Artifact) -> bool:
        """Whether an input was made again with different bytes since the artifact or an unfinished attempt read it."""
        work = self.work(artifact)
        for file in (artifact.folder / RECORD, work / RECORD, work / INPUT_HASHES):
            try:
                if remade_input(artifact, json.loads(file.read_text(encoding="utf-8"))):
                    return True
            except READ_ERRORS:
                continue
        return False

    def begin(self, artifact: Artifact, inputs_sha256: Mapping[str, str]) -> Path:
        """Create and return the work folder. It keeps the files of an earlier attempt, except temporary files.

        If the attempt is new, `inputs_sha256` (field -> sha256 of the input) is stored there."""
        work = self.work(artifact)
        work.mkdir(parents=True, exist_ok=True)
        for leftover in list(filter(is_temporary, work.rglob(".*"))):
            leftover.unlink(missing_ok=True)
        if not (work / INPUT_HASHES).exists():
            write_atomically(work / INPUT_HASHES, json.dumps({"inputs_sha256": inputs_sha256}).encode("utf-8"))
        return work

    def drop_work(self, artifact: Artifact) -> None:
        """Remove the work folder. Its record is removed first, so that a half-removed attempt is never sealed."""
        (self.work(artifact) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.work(artifact), ignore_errors=True)

    def unseal(self, artifact: Artifact) -> None:
        """Unseal the artifact, so that readers no longer find it. Its record becomes UNSEALED, which a repair reads."""
        if self.is_sealed(artifact):
            (artifact.folder / RECORD).replace(artifact.folder / UNSEALED)

    # --- Locks ---

    @property
    def garbage_lock(self) -> Path:
        """A lock file that `retort gc` holds exclusively. Commands share it while they make and write a plan, so that
        gc does not remove what the plan reuses."""
        return self.root / "locks" / "garbage"

    def lock_of(self, kind: str, fingerprint: str) -> Path:
        """The file that is locked while this artifact, or a part in this pool, is being made."""
        return self.root / "locks" / f"{kind}-{fingerprint}"


def changed_files(
    folder: Path, record: Mapping[str, Any], hash_file: Callable[[Path], str] | None = None
) -> Iterator[str]:
    """Yield the names of sealed files that are missing or have another size or, with `hash_file`, another sha256."""
    for name, about in record["files"].items():
        path = folder / name
        same = path.is_file() and path.stat().st_size == about["bytes"]
        if not same or (hash_file is not None and hash_file(path) != about["sha256"]):
            yield str(name)


def verify(folder: Path) -> dict[str, Any]:
    """Hash the files of a sealed artifact, and the parts that it lists.

    Returns {"target", "kind", "files": number of files hashed, "damaged": {path: what is wrong}}.
    """
    found: dict[str, Any] = {"target": str(folder), "kind": folder.parent.name, "files": 0}
    try:
        artifact = load_artifact(folder)
        record, parts = artifact.record, artifact.stage.parts(folder)
        damaged = dict.fromkeys(changed_files(folder, record, sha256_of), "missing or changed since it was sealed")
        damaged |= artifact.stage.damaged_parts(folder)
    except (UsageError, StageError) as error:  # its record, or its list of parts, cannot be read
        return {**found, "damaged": {RECORD: str(error)}}
    return {**found, "files": len(record["files"]) + len(parts), "damaged": damaged}


def remade_input(artifact: Artifact, record: Mapping[str, Any]) -> str | None:
    """Return the field path of the first input that was made again with different bytes, or None if there is none.

    The hashes of inputs are compared with those in the record. Inputs of inputs are compared too; their path is like
    `pairs.teacher`. Inputs that are not sealed are skipped.
    """
    for field, source in artifact.inputs.items():
        try:
            now, its_record = source.sha256, source.record
        except READ_ERRORS:
            continue
        if record.get("inputs_sha256", {}).get(field, now) != now:
            return field
        if deeper := remade_input(source, its_record):
            return f"{field}.{deeper}"
    return None


def damaged_input(artifact: Artifact, hash_file: Callable[[Path], str]) -> str | None:
    """Hash the files of all inputs and of their inputs. Return a sentence about the first damaged file, or None.

    A missing input counts as damaged. An input of an input may be missing, because it is no longer needed.
    """
    for folder, source in _ancestry(artifact).items():
        if not (folder / RECORD).exists() and source not in artifact.inputs.values():
            continue
        try:
            record = source.record
        except READ_ERRORS as error:
            return f"{source.kind}/{source.fingerprint} is damaged: its {RECORD} cannot be read ({error})"
        if changed := next(changed_files(folder, record, hash_file), None):
            return (
                f"{source.kind}/{source.fingerprint} is damaged: {folder / changed} is missing or changed since it was "
                "sealed. Restore the file; or delete it and make it again with: "
                f"retort resume {record['made_by']['run']} --store {folder.parent.parent}"
            )
    return None


def _ancestry(artifact: Artifact) -> dict[Path, Artifact]:
    """Return folder -> artifact for all inputs and their inputs."""
    found: dict[Path, Artifact] = {}
    for source in artifact.inputs.values():
        found |= {source.folder: source, **_ancestry(source)}
    return found


def lineage(folder: Path) -> Iterator[Path]:
    """Yield the folders of an artifact, its inputs and their inputs, and the folders of their pools.

    Raises UsageError for a record that cannot be read.
    """
    yield folder
    try:
        record = read_record(folder)
        pool, inputs = record["pool"], record["inputs"].values()
    except FileNotFoundError:
        return  # not made yet
    except READ_ERRORS as error:
        raise UsageError(f"{folder} is damaged: its record cannot be read ({error}); resume its run first") from None
    if pool:
        yield folder.parent / "pool" / pool
    for place in inputs:
        yield from lineage((folder / place).resolve())


def _is_scratch(inside: Path) -> bool:
    """Whether a path in a work folder is temporary: a checkpoint or a hidden file."""
    return SCRATCH in inside.parts or any(part.startswith(".") for part in inside.parts)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_artifact(folder: Path, *, unsealed: bool = False) -> Artifact:
    """Load the sealed artifact in `folder`, with its inputs and their inputs.

    If `unsealed`, the artifact may also be one that is being repaired. Raises UsageError if an artifact is missing or
    unsealed, if its record cannot be read, or if its kind or method is not installed.
    """
    try:
        record = read_record(folder) if unsealed else json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["kind"] not in KINDS:
            raise UsageError(f"{folder} is of kind {record['kind']!r}, {NOT_INSTALLED}")
        stage = KINDS[record["kind"]].model_validate_json(json.dumps(record["settings"]))
    except PluginError as error:
        raise UsageError(f"{folder}: {error}") from error
    except ValidationError as error:
        raise UsageError(f"{folder / RECORD}: {_unreadable(error)}") from None
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a sealed artifact: it has no {RECORD}") from None
    except READ_ERRORS as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from None
    inputs = {field: load_artifact((folder / place).resolve()) for field, place in record["inputs"].items()}
    return Artifact(stage, record["fingerprint"], folder, inputs, record["seed"])


def _unreadable(error: ValidationError) -> str:
    """Describe the first error in the settings of a record."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "settings"
    if first["type"] == "unknown_choice":
        return f"{field} is {first['input']!r}, {NOT_INSTALLED}"
    if first["type"] == "plugin":
        return f"{field}: {first['msg']}"
    return f"{field}: {first['msg']}; another version of Retort, or of a package that it uses, made the artifact"


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of an artifact that is sealed or being repaired. Raises OSError or ValueError."""
    path = folder / RECORD
    record: dict[str, Any] = json.loads((path if path.exists() else folder / UNSEALED).read_text(encoding="utf-8"))
    return record
