"""The store: sealed artifacts by content, work in progress, pools of parts, locks, runs.

STORE/KIND/FINGERPRINT/      a sealed artifact; artifact.json is written last
STORE/KIND/pool/FINGERPRINT/ finished parts that several artifacts of a kind may share
STORE/work/KIND-FINGERPRINT/ what an unfinished attempt has so far
STORE/locks/                 a file for each artifact and pool, locked by whoever makes it
STORE/runs/NAME/             see runs.py
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
from stages.base import SCRATCH, Artifact
from stages.data.files import fsync_folder, is_temporary, sha256_of, write_atomically
from stages.registry import PluginError

RECORD = "artifact.json"
UNSEALED = "unsealed.json"
"""The record of an artifact whose parts are being mended."""
BEGUN = ".inputs.json"
"""In a work folder: the sha256 of each input that the attempt reads."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged record raises."""
NOT_INSTALLED = "which no installed package offers; install the one that it was made with"


def is_url(root: Path | str) -> bool:
    return "://" in str(root)


class Store:
    """A folder, on a disk of this machine or shared by all nodes of a cluster."""

    def __init__(self, root: Path | str) -> None:
        if is_url(root):
            raise UsageError(
                f"store {root}: this version keeps its store in a folder; on a cluster, one that all share"
            )
        self.root = Path(root).expanduser().absolute()

    def folder(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / fingerprint

    def pool(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / "pool" / fingerprint

    def work(self, artifact: Artifact) -> Path:
        return self.root / "work" / f"{artifact.kind}-{artifact.fingerprint}"

    def create(self) -> None:
        """Make the folder. Raises UsageError where that is not possible."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in ("work", "locks", "runs"):
                (self.root / name).mkdir(exist_ok=True)
            probe = self.root / "work" / f".{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(f"store {self.root} cannot be written: {error.strerror}") from None

    @property
    def hashes(self) -> Path:
        """The file in which hashes are cached."""
        return self.root / "contents.json"

    # --- Artifacts ---

    def is_sealed(self, artifact: Artifact) -> bool:
        return (artifact.folder / RECORD).exists()

    def damage(self, artifact: Artifact) -> str | None:
        """Why a sealed artifact cannot be reused: a file is missing or of another size, or an input was made again
        with other bytes. None if it can. No file is hashed: whoever reads an artifact does that, and
        `retort verify`."""
        try:
            record = artifact.record
            changed, remade = changed_file(artifact.folder, record), remade_input(artifact, record)
        except UNREADABLE:
            return f"its {RECORD} cannot be read"
        if changed:
            return f"{changed} is missing or changed"
        if remade:
            return f"its input {remade} was made again with other bytes"
        return artifact.stage.damage(artifact.folder)

    def seal(self, artifact: Artifact, work: Path, record: Mapping[str, Any]) -> None:
        """Turn `work` into the artifact: hash the files, write the record, move the folder into its place."""
        files = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != RECORD and not _is_left(path.relative_to(work))
        }
        text = json.dumps({**record, "files": files}, indent=2, ensure_ascii=False) + "\n"
        fsync_folder(work)
        write_atomically(work / RECORD, text.encode("utf-8"))
        self.finish(artifact.folder, work)

    def finish(self, folder: Path, work: Path) -> None:
        """The end of sealing, which may be done again: from here on `work` holds a record, and only moves."""
        for path in list(work.rglob("*")):
            if _is_left(path.relative_to(work)):
                _remove(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        old = work.with_name(f"{work.name}-old")
        if folder.exists():  # damaged, or it would not have been made again
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        work.replace(folder)
        shutil.rmtree(old, ignore_errors=True)

    def outdated(self, artifact: Artifact) -> bool:
        """Whether what is there of it, sealed or unfinished, was made from inputs that were made again since, with
        other bytes."""
        work = self.work(artifact)
        for file in (artifact.folder / RECORD, work / RECORD, work / BEGUN):
            try:
                if remade_input(artifact, json.loads(file.read_text(encoding="utf-8"))):
                    return True
            except UNREADABLE:
                continue
        return False

    def begin(self, artifact: Artifact, inputs_sha256: Mapping[str, str]) -> Path:
        """The folder to make the artifact in. It may hold what an attempt before left, without the temporaries."""
        work = self.work(artifact)
        work.mkdir(parents=True, exist_ok=True)
        for left in list(filter(is_temporary, work.rglob(".*"))):
            left.unlink(missing_ok=True)
        if not (work / BEGUN).exists():
            write_atomically(work / BEGUN, json.dumps({"inputs_sha256": inputs_sha256}).encode("utf-8"))
        return work

    def drop_work(self, artifact: Artifact) -> None:
        """Remove what an unfinished attempt left. The record goes first: without it, nothing counts as sealed."""
        (self.work(artifact) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.work(artifact), ignore_errors=True)

    def unseal(self, artifact: Artifact) -> None:
        """From now on the artifact does not exist; its record is kept aside, for whoever mends it."""
        if self.is_sealed(artifact):
            (artifact.folder / RECORD).replace(artifact.folder / UNSEALED)

    # --- Locks ---

    @property
    def collecting(self) -> Path:
        """The file to lock alone while garbage is collected, together while a plan is made and frozen."""
        return self.root / "locks" / "garbage"

    def lock_of(self, kind: str, fingerprint: str) -> Path:
        """The file to lock while an artifact, or a pool, of this kind is being made."""
        return self.root / "locks" / f"{kind}-{fingerprint}"


def changed_file(folder: Path, record: Mapping[str, Any], hash_file: Callable[[Path], str] | None = None) -> str | None:
    """The first of `changed_files`; None if there is none."""
    return next(changed_files(folder, record, hash_file), None)


def changed_files(
    folder: Path, record: Mapping[str, Any], hash_file: Callable[[Path], str] | None = None
) -> Iterator[str]:
    """The sealed files that are missing or of another size or, with `hash_file`, of another sha256."""
    for name, about in record["files"].items():
        path = folder / name
        if (
            not path.is_file()
            or path.stat().st_size != about["bytes"]
            or (hash_file is not None and hash_file(path) != about["sha256"])
        ):
            yield str(name)


def remade_input(artifact: Artifact, record: Mapping[str, Any]) -> str | None:
    """The first input that no longer holds the bytes which the artifact was made from, as the path of its field; of an
    input's own inputs, `pairs.teacher`. None if there is none. Inputs that are not sealed now are not compared."""
    for field, source in artifact.inputs.items():
        try:
            now, its_record = source.sha256, source.record
        except UNREADABLE:
            continue
        if record.get("inputs_sha256", {}).get(field, now) != now:
            return field
        if deeper := remade_input(source, its_record):
            return f"{field}.{deeper}"
    return None


def damaged_input(artifact: Artifact, hash_file: Callable[[Path], str]) -> str | None:
    """A sentence about the first sealed file, of all that the artifact is made from, that is not what was sealed; None
    if all are. What its inputs were made from may have been removed since."""
    for folder, source in _ancestry(artifact).items():
        if not (folder / RECORD).exists() and source not in artifact.inputs.values():
            continue
        try:
            record = source.record
        except UNREADABLE as error:
            return f"{source.kind}/{source.fingerprint} is damaged: its {RECORD} cannot be read ({error})"
        if changed := changed_file(folder, record, hash_file):
            return (
                f"{source.kind}/{source.fingerprint} is damaged: {folder / changed} is missing or not what was sealed. "
                f"Put it back as it was; or remove it and make it again: retort resume {record['made_by']['run']} "
                f"--store {folder.parent.parent}"
            )
    return None


def _ancestry(artifact: Artifact) -> dict[Path, Artifact]:
    """Folder -> artifact: its inputs, and theirs."""
    found: dict[Path, Artifact] = {}
    for source in artifact.inputs.values():
        found |= {source.folder: source, **_ancestry(source)}
    return found


def lineage(folder: Path) -> Iterator[Path]:
    """An artifact's folder and those of all that it was made from, with their pools. Raises UsageError for a record
    that cannot be read."""
    yield folder
    try:
        record = read_record(folder)
        pool, inputs = record["pool"], record["inputs"].values()
    except FileNotFoundError:
        return  # not made yet
    except UNREADABLE as error:
        raise UsageError(f"{folder} is damaged ({error}) and could refer to anything: resume its run first") from None
    if pool:
        yield folder.parent / "pool" / pool
    for place in inputs:
        yield from lineage((folder / place).resolve())


def _is_left(inside: Path) -> bool:
    """Whether a path below a work folder belongs to the attempt alone, and not to what it made."""
    return SCRATCH in inside.parts or any(part.startswith(".") for part in inside.parts)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def load_artifact(folder: Path, *, unsealed: bool = False) -> Artifact:
    """The sealed artifact in `folder`, with all that it was made from; with `unsealed` also one that is being
    mended. Raises UsageError."""
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
        raise UsageError(f"{folder} is no sealed artifact: it has no {RECORD}") from None
    except UNREADABLE as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from None
    inputs = {field: load_artifact((folder / place).resolve()) for field, place in record["inputs"].items()}
    return Artifact(stage, record["fingerprint"], folder, inputs, record["seed"])


def _unreadable(error: ValidationError) -> str:
    """The first thing that is wrong with recorded settings."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "settings"
    if first["type"] == "unknown_choice":
        return f"{field} is {first['input']!r}, {NOT_INSTALLED}"
    if first["type"] == "plugin":
        return f"{field}: {first['msg']}"
    return f"{field}: {first['msg']}; another version of Retort, or of a package it uses, made it"


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an artifact that is sealed, or is being mended. Raises OSError or ValueError."""
    path = folder / RECORD
    record: dict[str, Any] = json.loads((path if path.exists() else folder / UNSEALED).read_text(encoding="utf-8"))
    return record
