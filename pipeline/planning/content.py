"""What outside files and repositories hold: the sha256 of their bytes, or the commit of a hub repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.manifest import Loaded, Manifest
from pipeline.manifest.fields import Marked, marked, replaced
from stages.base import Content, Stage
from stages.data.files import EVERYTHING, sha256_of, sha256_of_all, stamp_of, write_atomically


class Unknown(str):
    """Stands in for an identity that cannot be determined now. The text says why, and what to do."""


Contents = Mapping[str, Mapping[str, str]]
"""stage -> path of the field -> identity: `sha256:HEX`, `hub:COMMIT`, or Unknown."""


def read_contents(loaded: Loaded, cache_file: Path) -> Contents:
    """Identify everything that the manifest's stages read from outside the store. Hashes are cached in `cache_file`."""
    cache = HashCache(cache_file)
    contents = {name: identify(stage, cache) for name, stage in loaded.manifest.stages.items()}
    cache.save()
    return contents


def identify(stage: Stage, cache: HashCache) -> Mapping[str, str]:
    """Path of the field -> identity, for everything that one stage reads from outside the store."""
    return {field.path: _identify_field(field, cache) for field in marked(stage, Content)}


def pinned(manifest: Manifest, contents: Contents) -> Manifest:
    """Return the manifest with each hub revision replaced by the commit that was found. A resumed run then asks no
    hub."""
    stages = dict(manifest.stages)
    for name, stage in manifest.stages.items():
        commits = {}
        for field in marked(stage, Content):
            kind, _, commit = contents[name][field.path].partition(":")
            if kind == "hub":
                before = field.path.rpartition(".")[0]
                commits[f"{before}.{field.marker.revision_field}".removeprefix(".")] = commit
        stages[name] = replaced(stage, commits)
    return manifest.model_copy(update={"stages": stages})


def _identify_field(field: Marked, cache: HashCache) -> str:
    revision_field = field.marker.revision_field
    source = field.marker.source(field.value)
    if Path(source).is_absolute() or revision_field is None:
        try:
            return f"sha256:{cache.sha256_of(source, field.marker.files)}"
        except FileNotFoundError as error:
            return Unknown(str(error))
        except OSError as error:
            return Unknown(f"{source} cannot be read: {error.strerror}")
    return _hub_commit(source, getattr(field.owner, revision_field))


def _hub_commit(repository: str, revision: str | None) -> str:
    """The commit that a hub id stands for now. A full commit is returned unchecked, without a network call."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return f"hub:{revision}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return Unknown(f"{repository!r} is neither a folder nor a hub id; give a folder that exists, or owner/name")
    from huggingface_hub import HfApi

    try:
        return f"hub:{HfApi().model_info(repository, revision=revision, timeout=10).sha}"
    except Exception as error:  # the hub's client raises many types, all of which mean: not reached, or not found
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Unknown(
            f"the commit of {repository} cannot be looked up ({first}); give `revision:` a full commit, "
            "or give the path of a downloaded folder"
        )


class HashCache:
    """The sha256 of files, cached in one JSON file. A cached hash is used while the file's size, modification time and
    inode are unchanged. A cache file that cannot be read counts as empty."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            known = None
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        """Path -> [*stamp, sha256]. Entries of another form are ignored."""

    def sha256_of(self, source: str | Path, patterns: Sequence[str] = EVERYTHING) -> str:
        """As `stages.data.files.sha256_of_all`, with cached hashes."""
        return sha256_of_all(str(source), patterns, self._file_hash)

    def _file_hash(self, path: Path) -> str:
        stamp, known = list(stamp_of(path)), self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            return known[-1]
        found = sha256_of(path)
        self._known[str(path)] = [*stamp, found]
        self._changed = True
        return found

    def save(self) -> None:
        """Write the cache if it changed. A cache that cannot be written is skipped: it only saves time."""
        if self._changed and self._file.parent.exists():
            try:
                write_atomically(self._file, json.dumps(self._known).encode())
            except OSError:
                return
