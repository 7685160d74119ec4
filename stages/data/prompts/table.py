"""All prompts of a pool in one file: checked once, before anything is solved, then read by memory map.

Whatever the source was, sample i of the pool uses row i mod P, and no process ever holds all P texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from stages.base import StageError
from stages.data.files import EVERYTHING, publish, sha256_of_all, temporary_of
from stages.data.pool import PROMPTS
from stages.data.prompts.config import PATTERNS, Prompts
from stages.data.prompts.read import read_prompts

SCHEMA = pa.schema([("prompt", pa.string())])


def write_table(source: Prompts | None, contents: Mapping[str, str], path: Path) -> None:
    """Write the table that `PromptTable` reads, also over one that may be damaged. Without a source it holds one
    empty prompt.

    `contents` is what the plan found files to hold, by dotted path. Raises StageError for prompts that cannot
    be read, and when the file has changed since.
    """
    temporary = temporary_of(path)
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for batch in read_prompts(source) if source else [[""]]:
                writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=SCHEMA))
        _unchanged(source, contents)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _unchanged(source: Prompts | None, contents: Mapping[str, str]) -> None:
    """What was read must be what was planned: shards made from anything else would poison the pool."""
    for name, path, patterns in (
        ("prompts.path", source and source.path, PATTERNS),
        ("prompts.images.path", source and getattr(source.images, "path", None), EVERYTHING),
    ):
        if path and f"sha256:{sha256_of_all(path, patterns)}" != contents[name]:
            raise StageError(f"prompts {path} changed since the run was planned; resume to plan again with it as it is")


class PromptTable:
    """The prompts of a pool. Safe to share between threads; costs no memory but what is looked at."""

    def __init__(self, folder: Path) -> None:
        try:
            self._prompts = pa.ipc.open_file(pa.memory_map(str(folder / PROMPTS))).read_all().column(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise StageError(f"{folder / PROMPTS} cannot be read ({error}); resume the run that made it") from None

    def __len__(self) -> int:
        return len(self._prompts)

    def of(self, samples: Iterable[int]) -> list[str]:
        """Sample i uses prompt i mod P."""
        return [self._prompts[i % len(self)].as_py() for i in samples]

    def batches(self, count: int) -> Iterator[list[str]]:
        """All that the first `count` samples use, each once."""
        for chunk in self._prompts.slice(0, count).chunks:
            yield chunk.to_pylist()
