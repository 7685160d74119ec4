"""Writes shards of pairs: a tar that any webdataset reader can read, and a receipt beside it.

The tar's bytes depend only on its pairs. The receipt is published after the tar. A shard without a valid receipt counts
as missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stages.data import tars
from stages.data.files import publish, sha256_of, temporary_of
from stages.data.receipts import receipt_of, write_receipt
from stages.data.records import ArrayFacts, Pair, PromptFacts, ShardFacts
from stages.data.statistics import Moments, edges_of, histogram


def write_shard(tar: Path, pairs: Sequence[Pair], sample_facts: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Write `pairs` to `tar` with its receipt, and return the tar's sha256.

    `sample_facts` are added to every sample's .json member, beside its index. An interrupted call leaves no shard.
    Another call with the same pairs writes the same tar.
    """
    import webdataset as wds  # here, because it imports torch, which reading does not need

    temporary = temporary_of(tar)
    names = list(pairs[0].arrays)
    try:
        with open(temporary, "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
            for pair in pairs:
                writer.write(_members(pair, sample_facts))
        facts = ShardFacts(
            count=len(pairs),
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
            arrays={name: array_facts(name, np.stack([pair.arrays[name] for pair in pairs])) for name in names},
            prompts=prompt_facts([pair.prompt for pair in pairs]),
            provenance=provenance,
        )
        offsets = _array_offsets(temporary, names)
        publish(temporary, tar)
    finally:
        temporary.unlink(missing_ok=True)
    write_receipt(receipt_of(tar), pairs, offsets, facts)
    return facts.sha256


def _members(pair: Pair, sample_facts: dict[str, Any]) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": pair.key}
    for name, array in pair.arrays.items():
        buffer = BytesIO()
        np.save(buffer, array, allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    members["txt"] = pair.prompt.encode("utf-8")
    members["json"] = json.dumps({"index": pair.index, **sample_facts}, sort_keys=True).encode("utf-8")
    return members


def _array_offsets(tar: Path, names: list[str]) -> dict[str, list[int]]:
    """Return array name -> for each sample, the byte in the tar where its raw values begin, after the .npy header."""
    offsets: dict[str, list[int]] = {name: [] for name in names}
    with open(tar, "rb") as file:
        for sample in tars.walk(file):
            for name in names:
                file.seek(sample.members[f"{name}.npy"][0])
                npy_header(file)
                offsets[name].append(file.tell())
    return offsets


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and dtype from the .npy header at the file's position. The raw values follow at the new position.

    Raises ValueError if it is no .npy header.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f".npy of version {version}")
    shape, _, dtype = read(file)
    return shape, dtype


def array_facts(name: str, values: NDArray[np.floating]) -> ArrayFacts:
    """Return the statistics of the array `name` over the N samples of a shard. values: (N, ...)."""
    by_channel = list(np.moveaxis(values, 1, 0)) if values.ndim == 4 else []
    return ArrayFacts(
        dtype=values.dtype.name,  # type: ignore[arg-type]
        shape=list(values.shape[1:]),
        moments=Moments.of(values),
        channels=[Moments.of(channel) for channel in by_channel],
        histogram=histogram(values, edges_of(name)),
    )


def prompt_facts(prompts: Sequence[str]) -> PromptFacts:
    return PromptFacts(
        characters=Moments.of(np.array([len(prompt) for prompt in prompts])),
        words=Moments.of(np.array([len(prompt.split()) for prompt in prompts])),
        empty=sum(not prompt for prompt in prompts),
    )
