"""Walk tars of samples, as webdataset lays them out: members of one key follow one another.

Only regular files are looked at, nothing is ever extracted, and what a tar holds is taken for hostile.
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
    """A key and where its members lie: extension -> (offset of the data in the tar, bytes)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def walk(file: IO[bytes]) -> Iterator[TarSample]:
    """The samples of an uncompressed tar. Raises ValueError where it is damaged or ends too early."""
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
                    raise ValueError(f"not a readable tar: {member.name!r:.80} goes backwards")
                before = archive.offset
                end = member.offset_data + (member.size if member.isfile() else 0)
                if end > size:
                    raise ValueError(f"cut off in the middle of {member.name!r:.80}")
                archive.members = []  # type: ignore[attr-defined]  # a tar of a million members must not be remembered
                yield member
            # tarfile takes any garbage after the first member for the end: a tar really ends in zeros
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"not a tar from byte {archive.offset} on")
            if size < archive.offset + tarfile.BLOCKSIZE:
                raise ValueError("cut off: it does not end as a tar does")
    except (tarfile.TarError, UnicodeError, OverflowError, EOFError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a readable tar ({error})") from None


class _Member(tarfile.TarInfo):
    """A header; those that hold a name, or other headers, may not be long enough to fill the memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in (*LONG, *PAX) and not 0 <= self.size <= LONGEST:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def read(file: IO[bytes], place: tuple[int, int], most: float = math.inf) -> bytes:
    """A member's bytes. Raises ValueError if they are not all there, or more than `most`."""
    offset, size = place
    if size > most:
        raise ValueError(f"a member of {size} bytes")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("cut off in the middle of a member")
    return data
