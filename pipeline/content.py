"""What outside files and repositories hold: a sha256 of their bytes, or a hub repository's commit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.manifest import Loaded, Manifest, marked
from stages.base import Content, Stage
from stages.data.files import sha256_of, write_atomically


class Unknown(str):
    """A content that cannot be known now; the text says why and what to do."""


Contents = Mapping[str, Mapping[str, str]]
"""stage -> field -> identity (`name:...`, `sha256:...`, `hub:COMMIT`), or Unknown."""


def read_contents(loaded: Loaded, cache_file: Path) -> Contents:
    """Identify all that the manifest's stages read from outside. Hashes are cached by path, size and time."""
    cache = HashCache(cache_file)
    contents = {name: identify(stage, cache) for name, stage in loaded.manifest.stages.items()}
    cache.save()
    return contents


def identify(stage: Stage, cache: HashCache) -> Mapping[str, str]:
    """field -> identity, for all that one stage reads from outside."""
    return {field: _identify(stage, field, marker, cache) for field, marker in marked(stage, Content)}


def pinned(manifest: Manifest, contents: Contents) -> Manifest:
    """The manifest with each hub revision replaced by the commit that was found, so that resuming asks no hub."""
    stages = dict(manifest.stages)
    for name, stage in manifest.stages.items():
        for field, marker in marked(stage, Content):
            kind, _, commit = contents[name][field].partition(":")
            if kind == "hub":
                stages[name] = stage.model_copy(update={marker.revision_field: commit})
    return manifest.model_copy(update={"stages": stages})


def _identify(stage: Stage, field: str, content: Content, cache: HashCache) -> str:
    value: str = getattr(stage, field)
    if value in content.names:
        return f"name:{value}"
    path = Path(value)
    if path.is_absolute() or content.revision_field is None:
        if not path.exists():
            return Unknown(f"{value} does not exist")
        return f"sha256:{cache.of(path, content.files)}"
    return _hub_commit(value, getattr(stage, content.revision_field))


def _hub_commit(repository: str, revision: str | None) -> str:
    """The commit that a hub id stands for now. A full commit is taken at its word, without a network."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return f"hub:{revision}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return Unknown(f"{repository!r} is neither a folder nor a hub id such as owner/name")
    from huggingface_hub import HfApi

    try:
        return f"hub:{HfApi().model_info(repository, revision=revision, timeout=10).sha}"
    except Exception as error:  # the hub's client raises many kinds, all meaning: not reached or not there
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Unknown(
            f"the commit of {repository} cannot be looked up ({first}); give `revision:` a full commit, "
            "or a folder you have downloaded"
        )


class HashCache:
    """sha256 of files, remembered in one JSON file while size and modification time stay the same."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            self._known: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path, patterns: Sequence[str] = ("**/*",)) -> str:
        """A file's sha256; for a folder, that of the names and hashes of its files that match a pattern.
        Links are followed."""
        if path.is_file():
            return self._file_hash(path)
        found: set[Path] = set()
        for folder, _, names in os.walk(path, followlinks=True):
            inside = [(Path(folder) / name).relative_to(path) for name in names]
            found |= {p for p in inside if "**/*" in patterns or any(p.match(pattern) for pattern in patterns)}
        lines = [f"{name}\0{self._file_hash(path / name)}\n" for name in sorted(found)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _file_hash(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = sha256_of(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """A cache: where it cannot be written, nothing is lost but time."""
        if self._changed and self._file.parent.exists():
            try:
                write_atomically(self._file, json.dumps(self._known).encode())
            except OSError:
                return
