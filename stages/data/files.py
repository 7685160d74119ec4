"""Finds, hashes and atomically writes files. A published file is complete, even after a power failure."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

EVERYTHING = ("**/*",)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """As `sha256_of`, but cached in this process while size, modification time and inode of the file stay the same."""
    return _sha256_of(path, *stamp_of(path))


@cache
def _sha256_of(path: Path, *stamp: int) -> str:
    return sha256_of(path)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Return size in bytes, modification time in ns and inode.

    They change when a file is edited or replaced, but not when the disk corrupts it.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def files_of(source: str, patterns: Sequence[str] = EVERYTHING) -> dict[str, Path]:
    """Return name -> path, sorted by name, for a single file, for the files of a folder that match a pattern, or for a
    glob.

    Names are relative to the folder, or to the common folder of a glob's matches. Links are followed. Raises
    FileNotFoundError if no file is found.
    """
    path = Path(source)
    if path.is_file():
        return {path.name: path}
    found: dict[str, Path] = {}
    if path.is_dir():
        for inside in (file.relative_to(path) for file in _files_below(path)):
            if any(_matches(inside, pattern) for pattern in patterns):
                found[str(inside)] = path / inside
    elif glob.has_magic(source):
        found = {str(match): match for match in _globbed(path) if match.is_file()}
        common = os.path.commonpath([str(match.parent) for match in found.values()]) if found else ""
        found = {os.path.relpath(name, common): match for name, match in found.items()}
    if not found:
        raise FileNotFoundError(f"{source} " + ("holds no such file" if path.is_dir() else "does not exist"))
    return dict(sorted(found.items()))


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield all files at any depth. Links are followed, except to a folder that contains them (one of `above`)."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if os.path.isdir(entry):
            yield from _files_below(Path(entry.path), above | {real})
        else:
            yield Path(entry.path)


def _globbed(pattern: Path) -> Iterator[Path]:
    """As `glob.glob`, but stops at loops of links."""
    if "**" not in pattern.parts:
        return map(Path, glob.glob(str(pattern)))
    from fsspec.utils import glob_translate  # here, because planning rarely needs it

    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    folder, below = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
    fits, hidden = re.compile(glob_translate("/".join(below))).match, any(part.startswith(".") for part in below)
    inside = (file.relative_to(folder) for file in _files_below(folder))
    return (folder / f for f in inside if fits(f.as_posix()) and (hidden or not _is_hidden(f)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _matches(path: Path, pattern: str) -> bool:
    """Whether a path matches a pattern of `Path.glob`: at the pattern's depth, or after `**/` at any depth.

    Suffixes match in upper case, too. Hidden files never match.
    """
    anywhere, name = pattern.startswith("**/"), pattern.removeprefix("**/")
    deep_enough = anywhere or len(path.parts) == name.count("/") + 1
    lowered = path.with_name(path.name.lower())  # IMG.JPG is a .jpg
    return deep_enough and (path.match(name) or lowered.match(name)) and not _is_hidden(path)


def sha256_of_all(
    source: str, patterns: Sequence[str] = EVERYTHING, hash_file: Callable[[Path], str] = sha256_of
) -> str:
    """Return the sha256 of a file; for several files, the sha256 of their names and hashes."""
    if Path(source).is_file():
        return hash_file(Path(source))
    lines = [f"{name}\0{hash_file(path)}\n" for name, path in files_of(source, patterns).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Flush everything in `folder` to disk, then the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder to its final name in the same folder, and flush it to disk."""
    _fsync(temporary)
    os.replace(temporary, final)
    _fsync(final.parent)


def temporary_of(path: Path) -> Path:
    """Return a hidden name beside `path` that is unique on all hosts. Readers ignore it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_of` named the file. A killed writer left it, unless a writer is still at work."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name) is not None and path.is_file()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file through a temporary file, so that readers see the old or the new content, never a part of it."""
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
