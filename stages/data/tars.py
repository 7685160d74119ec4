"""Reads tars in the webdataset layout, where the members of a sample are consecutive and share a key.

The content of a tar is not trusted: only regular files are read, and nothing is extracted to disk.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LONGEST = 1024**2


@dataclass
class TarSample:
    """A sample's key and members: lower-case extension -> (offset of the data in the tar, bytes)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def walk(file: IO[bytes]) -> Iterator[TarSample]:
    """Yield the samples of an uncompressed tar. Raises ValueError where it is damaged or truncated."""
    sample: TarSample | None = None
    for member in _members(file):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = f"{folder}{slash}{stem}"
        if sample is None or key != sample.key or extension.lower() in sample.members:
            if sample:
                yield sample
            sample = TarSample(key)
        sample.members[extension.lower()] = (member.offset_data, member.size)
    if sample:
        yield sample


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    size = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            before = -1
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= before:
                    raise ValueError(f"not a readable tar: {member.name!r:.80} has an invalid size")
                before = archive.offset
                end = member.offset_data + (member.size if member.isfile() else 0)
                if end > size:
                    raise ValueError(f"cut off in the middle of {member.name!r:.80}")
                archive.members = []  # type: ignore[attr-defined]  # or memory would grow with every member
                yield member
            # tarfile accepts any garbage after the first member as the end of the tar; a real end is a block of zeros
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"no valid tar header at byte {archive.offset}")
            if size < archive.offset + tarfile.BLOCKSIZE:
                raise ValueError("cut off: the zeros at the end of a tar are missing")
    except (tarfile.TarError, UnicodeError, OverflowError, EOFError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a readable tar ({error})") from None


class _Member(tarfile.TarInfo):
    """A header. Limits headers that hold a long name or PAX records to LONGEST bytes, so that they fit into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*LONG, *PAX) and not 0 <= self.size <= LONGEST:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def read(file: IO[bytes], place: tuple[int, int], most: float = math.inf) -> bytes:
    """Read the bytes of a member at (offset, size). Raises ValueError if it is cut off or larger than `most` bytes."""
    offset, size = place
    if size > most:
        raise ValueError(f"a member is too large: {size} bytes")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("cut off in the middle of a member")
    return data
