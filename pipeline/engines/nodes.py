"""Check that the nodes of a cluster have the same build of Retort as this process."""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from pathlib import Path

from stages.data.provenance import versions

OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Environment variables that Ray prefers to an address given in code. Retort ignores them."""

SOURCES = (
    "pipeline/**/*.py",
    "pipeline/reference/templates/*",
    "stages/**/*.py",
    "stages/data/templates/*",
    "stages/teacher/shipped/**/*",
)
"""Globs of the files that belong to a build: the packages and their data."""


def version() -> str:
    """The version of this installation of Retort."""
    return versions().get("retort", "unknown")


@cache
def build() -> str:
    """The version of this installation and a hash of its sources: `0.1.0+0123456789abcdef`."""
    return f"{version()}+{hash_of_sources(Path(__file__).parents[2])}"


def hash_of_sources(root: Path) -> str:
    """Hash the names and bytes of the SOURCES below `root`: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:16]


def needs() -> str:
    """What to install on every node: `retort==..., ray==... and Python ...`."""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"retort=={version()}, ray=={versions().get('ray', 'unknown')} and Python {python}"


def build_difference(node: str, driver: str, theirs: str) -> str | None:
    """Compare this build with `theirs`, the build of `driver`. Return None if they are equal, or else the difference
    and what to do.

    `node` and `driver` are the names of this machine and of the other one in the message.
    """
    if theirs == build():
        return None
    wanted = theirs.partition("+")[0]
    if wanted == version():
        return f"{node} runs other sources of retort {wanted} than {driver}: install the same commit on every node"
    return f"{node} has retort {version()}, {driver} {wanted}: install retort=={wanted} on every node"
