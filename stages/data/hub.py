"""Downloads files of hub repositories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.base import StageError


def commit_of(identity: str) -> str | None:
    """Return the commit in the identity of a content, or None if the content is not on the hub."""
    return identity.removeprefix("hub:") if identity.startswith("hub:") else None


def snapshot(source: str, commit: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Download the files of a hub repository that match a pattern and no ignored one. Raises StageError on failure."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=commit, allow_patterns=list(patterns), ignore_patterns=[*ignored])
        )
    except Exception as error:  # the hub's client raises many kinds; all mean: not reached, or not found
        first = (str(error).strip() or "no reason given").splitlines()[0]
        raise StageError(
            f"{source} cannot be downloaded ({type(error).__name__}: {first}); "
            "download it on a machine with a network, and give its folder"
        ) from error
