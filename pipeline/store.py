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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UsageError
from stages import KINDS
from stages.base import SCRATCH, Artifact
from stages.data.files import fsync_folder, sha256_of, write_atomically
from stages.registry import PluginError

RECORD = "artifact.json"
UNSEALED = "unsealed.json"
"""The record of an artifact whose parts are being mended."""
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

    # --- Artifacts ---

    def is_sealed(self, artifact: Artifact) -> bool:
        return (artifact.folder / RECORD).exists()

    def damage(self, artifact: Artifact) -> str | None:
        """Why a sealed artifact cannot be believed: a file missing or of another size. None if it can."""
        try:
            changed = changed_file(artifact.folder, artifact.record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"its {RECORD} cannot be read"
        if changed:
            return f"{changed} is missing or changed"
        return artifact.stage.damage(artifact.folder)

    def seal(self, artifact: Artifact, work: Path, record: Mapping[str, Any]) -> None:
        """Turn `work` into the artifact: hash the files, write the record, move the folder into its place."""
        files = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != RECORD and SCRATCH not in path.relative_to(work).parts
        }
        text = json.dumps({**record, "files": files}, indent=2, ensure_ascii=False) + "\n"
        fsync_folder(work)
        write_atomically(work / RECORD, text.encode("utf-8"))
        self.finish(artifact, work)

    def finish(self, artifact: Artifact, work: Path) -> None:
        """The end of sealing, which may be done again: from here on `work` holds a record, and only moves."""
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        artifact.folder.parent.mkdir(parents=True, exist_ok=True)
        old = work.with_name(f"{work.name}-old")
        if artifact.folder.exists():  # damaged, or it would not have been made again
            shutil.rmtree(old, ignore_errors=True)
            artifact.folder.replace(old)
        work.replace(artifact.folder)
        shutil.rmtree(old, ignore_errors=True)

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


def changed_file(folder: Path, record: Mapping[str, Any]) -> str | None:
    """The first sealed file that is missing or of another size. None if there is none."""
    for name, about in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            return str(name)
    return None


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
