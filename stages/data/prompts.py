"""Prompts: sample i of a pool uses prompt i mod P."""

from __future__ import annotations

from pathlib import Path

from stages.base import StageError
from stages.data import digits

BUILT_IN = ("digits",)


def load(source: str) -> list[str]:
    """The captions of a built-in image set, or the lines of a .txt file. Raises StageError."""
    if source in BUILT_IN:
        return digits.captions()
    path = Path(source)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise StageError(f"prompts {source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise StageError(f"prompts {source}, line {line}: not UTF-8") from None
    prompts = text.splitlines()
    empty = next((i for i, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
    if not prompts or empty is not None:
        where = f", line {empty}: empty" if prompts else " is empty"
        raise StageError(f"prompts {source}{where}; expected one prompt a line")
    return prompts
