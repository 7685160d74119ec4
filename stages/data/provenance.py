"""Versions of the packages that a result was made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return package -> version, for Python and the installed packages that can affect a result."""
    found = {"python": platform.python_version()}
    for name in ("retort", "torch", "diffusers", "transformers", "numpy", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
