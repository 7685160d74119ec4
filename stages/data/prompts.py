"""Prompts: sample i of a pool uses prompt i mod P."""

from __future__ import annotations

from pathlib import Path

from stages.base import StageError
from stages.data.files import sha256_of

BUILT_IN = ("digits",)


def problem(source: str) -> str | None:
    """Why `source` cannot be prompts, from its name alone; None if it can."""
    if source in BUILT_IN or source.endswith(".txt"):
        return None
    return f"prompts are {', '.join(BUILT_IN)} or a .txt file with one prompt a line, not {source!r}"


def load(source: str, identity: str) -> list[str]:
    """The captions of a built-in image set, or the lines of a .txt file in UTF-8.

    `identity` is what the plan found the content to be. Raises StageError if the file cannot be read, holds an
    empty line or anything else than what was planned.
    """
    if source in BUILT_IN:
        from stages.data import digits  # here: planning asks for `problem` only, and must not wait for numpy

        return digits.captions()
    path = Path(source)
    try:
        if identity != f"sha256:{sha256_of(path)}":
            raise StageError(
                f"prompts {source} changed since the run was planned; resume to plan again with it as it is"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise StageError(f"prompts {source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise StageError(f"prompts {source}, line {line}: not UTF-8") from None
    prompts = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    empty = next((i for i, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
    if empty is not None:
        raise StageError(f"prompts {source}, line {empty}: empty; expected one prompt a line")
    return prompts
