"""The prompt table: all prompts of a pool in one Arrow file. They are checked once, before the first ODE is solved.

Workers map the file into memory, so no process holds all P prompts. Sample i of the pool uses prompt i mod P.
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
    """Write the table that `PromptTable` reads. Replaces an existing table. Without a source, the table has one empty
    prompt.

    contents: dotted path of a setting -> hash of its files when the run was planned. Raises StageError if prompts
    cannot be read, or if the files changed since then.
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
    """Raise StageError if the files changed since the plan. Shards with other prompts would corrupt the pool."""
    for name, path, patterns in (
        ("prompts.path", source and source.path, PATTERNS),
        ("prompts.images.path", source and getattr(source.images, "path", None), EVERYTHING),
    ):
        if path and f"sha256:{sha256_of_all(path, patterns)}" != contents[name]:
            raise StageError(f"prompts {path} changed since the run was planned; resume the run to plan it again")


class PromptTable:
    """The prompts of a pool, memory-mapped. Threads can share it. Raises StageError if the file cannot be read."""

    def __init__(self, folder: Path) -> None:
        try:
            self._prompts = pa.ipc.open_file(pa.memory_map(str(folder / PROMPTS))).read_all().column(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise StageError(f"{folder / PROMPTS} cannot be read ({error}); resume the run that made it") from None

    def __len__(self) -> int:
        return len(self._prompts)

    def of(self, samples: Iterable[int]) -> list[str]:
        """Return the prompts of samples. Sample i uses prompt i mod P."""
        return [self._prompts[i % len(self)].as_py() for i in samples]

    def batches(self, count: int) -> Iterator[list[str]]:
        """Yield, in batches, the prompts that the first `count` samples use, each once."""
        for chunk in self._prompts.slice(0, count).chunks:
            yield chunk.to_pylist()
