"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Flush all that is in `folder`, then the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def publish(temporary: Path, final: Path) -> None:
    """Move a finished file of the same folder to its final name, durably."""
    _fsync(temporary)
    os.replace(temporary, final)
    _fsync(final.parent)


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no reader looks at and no other writer takes, on whatever host."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def write_atomically(path: Path, content: bytes) -> None:
    temporary = temporary_of(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
