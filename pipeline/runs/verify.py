"""Verify a sealed artifact: read and hash all its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.store import RECORD, load_artifact
from pipeline.store.artifacts import changed_files
from stages.base import StageError
from stages.data.files import sha256_of


def verify(folder: Path) -> dict[str, Any]:
    """Hash the files of a sealed artifact, and the parts that it lists.

    Returns {"target", "kind", "files": number of files hashed, "damaged": {path: what is wrong}}.
    """
    found: dict[str, Any] = {"target": str(folder), "kind": folder.parent.name, "files": 0}
    try:
        artifact = load_artifact(folder)
        files, parts = artifact.record["files"], artifact.stage.parts(folder)
        changed = dict.fromkeys(
            changed_files(folder, artifact.record, sha256_of), "missing or changed since it was sealed"
        )
        damaged = {**changed, **artifact.stage.damaged_parts(folder)}
    except (UsageError, StageError) as error:  # its record, or its list of parts, cannot be read
        return {**found, "damaged": {RECORD: str(error)}}
    return {**found, "files": len(files) + len(parts), "damaged": damaged}
