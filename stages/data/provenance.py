"""What a result was made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Of everything that may change a result; of what is not installed, nothing."""
    found = {"python": platform.python_version()}
    for name in ("retort", "torch", "diffusers", "transformers", "numpy", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
