"""Identifies contents: files by the sha256 of their bytes, and repositories of the Hugging Face Hub by their commit.

A content is a file, folder or repository outside the store that a stage reads.
"""

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
    """Takes the place of an identity that cannot be determined. The text says why, and what the user can do."""


Contents = Mapping[str, Mapping[str, str]]
"""Stage -> field path -> identity of the content: `sha256:HEX`, `hub:COMMIT`, or Unknown."""


def read_contents(loaded: Loaded, cache_file: Path) -> Contents:
    """Return the identities of all contents that the manifest's stages read. Hashes are cached in `cache_file`."""
    cache = HashCache(cache_file)
    contents = {name: identify(stage, cache) for name, stage in loaded.manifest.stages.items()}
    cache.save()
    return contents


def identify(stage: Stage, cache: HashCache) -> Mapping[str, str]:
    """Return field path -> identity of all contents that one stage reads."""
    return {field.path: _identify_field(field, cache) for field in marked(stage, Content)}


def pinned(manifest: Manifest, contents: Contents) -> Manifest:
    """Return the manifest with each hub revision replaced by its commit, so that resuming asks the hub for nothing."""
    stages = dict(manifest.stages)
    for name, stage in manifest.stages.items():
        for field in marked(stage, Content):
            kind, _, commit = contents[name][field.path].partition(":")
            if kind == "hub":
                parent, dot, _ = field.path.rpartition(".")
                stages[name] = replaced(stages[name], {f"{parent}{dot}{field.marker.revision_field}": commit})
    return manifest.model_copy(update={"stages": stages})


def _identify_field(field: Marked, cache: HashCache) -> str:
    revision_field = field.marker.revision_field
    source = field.marker.source(field.value)
    if Path(source).is_absolute() or revision_field is None:
        try:
            return f"sha256:{cache.sha256_of(source, field.marker.patterns(source))}"
        except FileNotFoundError as error:
            return Unknown(str(error))
        except OSError as error:
            return Unknown(f"{source} cannot be read: {error.strerror}")
    return _hub_commit(source, getattr(field.owner, revision_field))


def _hub_commit(repository: str, revision: str | None) -> str:
    """Return the current commit of a hub repository. A full commit is returned without a request to the hub."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return f"hub:{revision}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or repository.endswith(".safetensors"):
        return Unknown(
            f"{repository!r} is neither a file or folder that exists nor a hub id; give a path, or owner/name"
        )
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
    """Caches the sha256 of files in one JSON file, which counts as empty if it cannot be read.

    A hash is used as long as the size, modification time and inode of its file are the same."""

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
        """Like `sha256_of_all`. Raises FileNotFoundError if there is no file."""
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
        """Write the cache if it changed. Errors are ignored, because the cache only saves time."""
        if self._changed and self._file.parent.exists():
            try:
                write_atomically(self._file, json.dumps(self._known).encode())
            except OSError:
                return
