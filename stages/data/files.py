"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import glob
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

EVERYTHING = ("**/*",)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(source: str, patterns: Sequence[str] = EVERYTHING) -> dict[str, Path]:
    """Name -> path, sorted by name: of a file, of those in a folder that match a pattern, or of a glob's matches.
    Links are followed. Raises FileNotFoundError if there is none."""
    path = Path(source)
    if path.is_file():
        return {path.name: path}
    found: dict[str, Path] = {}
    if path.is_dir():
        for folder, _, names in os.walk(path, followlinks=True):
            for inside in [(Path(folder) / name).relative_to(path) for name in names]:
                if any(_matches(inside, pattern) for pattern in patterns):
                    found[str(inside)] = path / inside
    elif glob.has_magic(source):
        found = {match: Path(match) for match in glob.glob(source, recursive=True) if Path(match).is_file()}
        common = os.path.commonpath([str(match.parent) for match in found.values()]) if found else ""
        found = {os.path.relpath(name, common): match for name, match in found.items()}
    if not found:
        raise FileNotFoundError(f"{source} " + ("holds no such file" if path.is_dir() else "does not exist"))
    return dict(sorted(found.items()))


def _matches(path: Path, pattern: str) -> bool:
    """As `Path.glob`: at exactly the pattern's depth, or with `**/` before it at any. Hidden files never."""
    anywhere, name = pattern.startswith("**/"), pattern.removeprefix("**/")
    deep_enough = anywhere or len(path.parts) == name.count("/") + 1
    lowered = path.with_name(path.name.lower())  # IMG.JPG is a .jpg
    return (
        deep_enough
        and (path.match(name) or lowered.match(name))
        and not any(part.startswith(".") for part in path.parts)
    )


def sha256_of_all(
    source: str, patterns: Sequence[str] = EVERYTHING, hash_file: Callable[[Path], str] = sha256_of
) -> str:
    """A file's sha256; of several files, that of their names and hashes."""
    if Path(source).is_file():
        return hash_file(Path(source))
    lines = [f"{name}\0{hash_file(path)}\n" for name, path in files_of(source, patterns).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
