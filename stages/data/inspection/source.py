"""Where shards to inspect lie: a folder here, or any URL that fsspec knows (s3://, gs://, https://...). Read only."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from fsspec.core import url_to_fs

from stages.base import StageError
from stages.data.pool import LIST, parse_list


@dataclass(frozen=True)
class Listed:
    """A tar, and of a sealed artifact what it was when it was sealed."""

    path: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def receipt(self) -> str:
        return self.path.removesuffix(".tar") + ".parquet"


class Source:
    """The files below a folder or URL. Of a sealed `pairs` artifact, those of its pool."""

    def __init__(self, target: str) -> None:
        try:
            self._fs, root = url_to_fs(target)
            self.sealed = self._sealed(root)
            self.root = posixpath.join(posixpath.dirname(root), "pool", self.sealed["pool"]) if self.sealed else root
            self.sizes = self._sizes()
        except StageError:
            raise
        except Exception as error:  # each file system raises its own kinds
            first = (str(error).strip() or "no reason given").splitlines()[0]
            raise StageError(f"{target} cannot be read ({type(error).__name__}: {first})") from None

    def _sealed(self, root: str) -> dict[str, Any] | None:
        path = posixpath.join(root, LIST)
        return parse_list(self._fs.cat_file(path), path) if self._fs.exists(path) else None

    def _sizes(self) -> dict[str, int]:
        """Path below the root -> bytes. Hidden files are what a killed worker left."""
        if self._fs.isfile(self.root):
            name = posixpath.basename(self.root)
            self.root = posixpath.dirname(self.root)
            found = {posixpath.join(self.root, name): self._fs.info(posixpath.join(self.root, name))}
        else:
            found = self._fs.find(self.root, detail=True)
        inside = {posixpath.relpath(path, self.root): int(about["size"] or 0) for path, about in found.items()}
        return {
            path: size
            for path, size in sorted(inside.items())
            if not any(part.startswith(".") for part in PurePosixPath(path).parts)
        }

    def tars(self) -> list[Listed]:
        """Of a sealed artifact the listed ones, whether they are there or not; else all that are there, and those
        that a receipt says should be."""
        if self.sealed:
            return [Listed(s["tar"], s["bytes"], s["sha256"]) for s in self.sealed["shards"]]
        stems = {path.rpartition(".")[0] for path in self.sizes if path.endswith((".tar", ".parquet"))}
        return [Listed(f"{stem}.tar") for stem in sorted(stems)]

    def open(self, path: str) -> IO[bytes]:
        file: IO[bytes] = self._fs.open(posixpath.join(self.root, path), "rb")
        return file

    def read(self, path: str) -> bytes:
        content: bytes = self._fs.cat_file(posixpath.join(self.root, path))
        return content

    def blocks(self, path: str, size: int = 1 << 20) -> Iterator[bytes]:
        with self.open(path) as file:
            while block := file.read(size):
                yield block

    def json(self, path: str) -> Any:
        return json.loads(self.read(path))
