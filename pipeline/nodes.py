"""What the nodes of a cluster need to have installed, and what of their environment must not be followed."""

from __future__ import annotations

import sys

from pipeline.errors import UsageError
from stages.data.provenance import versions

OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray prefers to an address given in code."""


def version() -> str:
    """Of this installation of Retort."""
    return versions().get("retort", "unknown")


def needs() -> str:
    """What to install on every node so that it can work with this installation."""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"retort=={version()}, ray=={versions().get('ray', 'unknown')} and Python {python}"


def check_submitted_by(theirs: str) -> None:
    """Raise UsageError if the run was planned by another version of Retort than this one, which is to carry it out."""
    if theirs != version():
        raise UsageError(
            f"submitted by retort {theirs}, but this node has retort {version()}: "
            f"install retort=={theirs} on every node of the cluster"
        )
