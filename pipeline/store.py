"""The store: sealed artifacts by content, work in progress, pools of parts, locks, runs.

STORE/KIND/FINGERPRINT/      a sealed artifact; artifact.json is written last
STORE/KIND/pool/FINGERPRINT/ finished parts that several artifacts of a kind may share
STORE/work/KIND-FINGERPRINT/ what an unfinished attempt has so far
STORE/locks/                 one file an artifact, locked by whoever makes it
STORE/runs/NAME/             see runs.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import Locked, UsageError
from stages import KINDS
from stages.base import Artifact
from stages.data.files import fsync_folder, sha256_of, write_atomically

RECORD = "artifact.json"


class Store:
    """A folder, on a disk of this machine or shared by all nodes of a cluster."""

    def __init__(self, root: Path | str) -> None:
        if "://" in str(root):
            raise UsageError(
                f"store {root}: this version keeps its store in a folder; on a cluster, one that all share"
            )
        self.root = Path(root).absolute()

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
            files: dict[str, dict[str, Any]] = artifact.record["files"]
        except (OSError, ValueError, KeyError):
            return f"its {RECORD} cannot be read"
        for name, about in files.items():
            path = artifact.folder / name
            if not path.is_file() or path.stat().st_size != about["bytes"]:
                return f"{name} is missing or changed"
        return artifact.stage.damage(artifact.folder)

    def seal(self, artifact: Artifact, work: Path, record: Mapping[str, Any]) -> None:
        """Turn `work` into the artifact: hash the files, write the record, move the folder into its place."""
        files = {
            str(path.relative_to(work)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != RECORD
        }
        text = json.dumps({**record, "files": files}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(work / RECORD, text.encode("utf-8"))
        fsync_folder(work)
        artifact.folder.parent.mkdir(parents=True, exist_ok=True)
        if artifact.folder.exists():  # damaged, or it would not have been made again
            shutil.rmtree(artifact.folder)
        work.replace(artifact.folder)

    # --- Locks ---

    @contextmanager
    def lock(self, artifact: Artifact, run: str) -> Iterator[None]:
        """Hold the artifact's lock. Raises Locked, naming the holder. A killed holder's lock is free at once."""
        path = self._lock_file(artifact.kind, artifact.fingerprint)
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Locked(
                    f"{artifact.kind}/{artifact.fingerprint} is being made by "
                    f"{self.holder(artifact.kind, artifact.fingerprint)}; wait for it (--wait), or stop it"
                ) from None
            file.truncate(0)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            holder = {"run": run, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
            file.write(json.dumps(holder))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def holder(self, kind: str, fingerprint: str) -> str | None:
        """Who holds an artifact's lock, in words; None if it is free."""
        path = self._lock_file(kind, fingerprint)
        if not path.exists():
            return None
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                try:
                    who = json.loads(file.read())
                except ValueError:
                    return "another process"
                return f"run {who['run']} (process {who['pid']} on {who['host']}, since {who['since']})"

    def _lock_file(self, kind: str, fingerprint: str) -> Path:
        return self.root / "locks" / f"{kind}-{fingerprint}"


def load_artifact(folder: Path) -> Artifact:
    """The sealed artifact in `folder`, with all that it was made from. Raises UsageError."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        stage = KINDS[record["kind"]].model_validate_json(json.dumps(record["settings"]))
    except FileNotFoundError:
        raise UsageError(f"{folder} is no sealed artifact: it has no {RECORD}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder / RECORD} cannot be read: {error}") from None
    inputs = {field: load_artifact((folder / place).resolve()) for field, place in record["inputs"].items()}
    return Artifact(stage, record["fingerprint"], folder, inputs)
