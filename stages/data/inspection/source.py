"""Reads the files of a local folder, or of any URL that fsspec supports (s3://, gs://, https://...). Never writes."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any

from fsspec.core import url_to_fs

from stages.base import StageError
from stages.data.pool import LIST, PROMPTS, parse_list
from stages.data.receipts import SEAL
from stages.data.urls import redacted

SAMPLED = 100
"""Maximum number of Parquet files that are searched for a receipt's seal."""
LARGEST_RECEIPT = 256 * 1024**2


@dataclass(frozen=True)
class Listed:
    """A tar. If it belongs to a sealed artifact: also its samples, bytes and hash when it was sealed."""

    path: str
    count: int | None = None
    bytes: int | None = None
    sha256: str | None = None

    @property
    def receipt(self) -> str:
        return self.path.removesuffix(".tar") + ".parquet"


class Source:
    """The files below a folder or URL. For a sealed `pairs` artifact: the files of its pool.

    Raises StageError if the target cannot be read.
    """

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
            raise StageError(redacted(f"{target} cannot be read ({type(error).__name__}: {first})")) from None

    def _sealed(self, root: str) -> dict[str, Any] | None:
        path = posixpath.join(root, LIST)
        return parse_list(self._fs.cat_file(path), path) if self._fs.exists(path) else None

    def _sizes(self) -> dict[str, int]:
        """Return path relative to the root -> bytes. Hidden files are skipped: killed workers leave them."""
        if self.root.endswith(".tar"):
            receipt = Listed(self.root).receipt
            found = {path: self._fs.info(path) for path in (self.root, receipt) if self._fs.exists(path)}
            if not found:
                raise FileNotFoundError(self.root)
            self.root = posixpath.dirname(self.root)
        else:
            found = self._fs.find(self.root, detail=True)
        inside = {posixpath.relpath(path, self.root): self._size(path, about) for path, about in found.items()}
        return {
            path: size
            for path, size in sorted(inside.items())
            if not any(part.startswith(".") for part in PurePosixPath(path).parts)
        }

    def _size(self, path: str, about: dict[str, Any]) -> int:
        """Return a file's bytes. Listings over HTTP have no sizes, so the file itself is asked."""
        size = about.get("size")
        return int((self._fs.info(path).get("size") or 0) if size is None else size)

    @cached_property
    def receipted(self) -> bool:
        """Whether Retort made the shards: there is a list, a prompt table, or a receipt with a seal.

        A Parquet file beside a tar proves nothing: img2dataset writes them, too.
        """
        if self.sealed or PROMPTS in self.sizes:
            return True
        tables = [path for path in self.sizes if path.endswith(".parquet")]
        return any(SEAL in self.read(path) for path in tables[:SAMPLED] if self.sizes[path] <= LARGEST_RECEIPT)

    def tars(self) -> list[Listed]:
        """Return the tars. For a sealed artifact, these are the tars in its list, even missing ones. For other targets,
        they are the existing tars, and missing tars that have a receipt of Retort.
        """
        if self.sealed:
            return [Listed(s["tar"], s["count"], s["bytes"], s["sha256"]) for s in self.sealed["shards"]]
        kinds = (".tar", ".parquet") if self.receipted else (".tar",)
        stems = {path.rpartition(".")[0] for path in self.sizes if path.endswith(kinds)}
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
