"""Prints the oldest releases that pyproject.toml allows, as requirements for pip: `python -m tests.lowest`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(text: str) -> Iterator[str]:
    """Return `name==VERSION` for each direct dependency of a pyproject.toml, also of its extras except `test`. Raises
    ValueError for a dependency without a lower bound, because that allows every release."""
    project = tomllib.loads(text)["project"]
    extras = [of for name, of in project.get("optional-dependencies", {}).items() if name != "test"]
    for dependency in chain(project["dependencies"], *extras):
        found = Requirement(dependency)
        bounds = [bound.version for bound in found.specifier if bound.operator == ">="]
        if not bounds:
            raise ValueError(f"{dependency} has no lower bound")
        extra = f"[{','.join(sorted(found.extras))}]" if found.extras else ""
        yield f"{found.name}{extra}=={bounds[0]}"


if __name__ == "__main__":
    print(*lowest(PROJECT.read_text(encoding="utf-8")), sep="\n")
