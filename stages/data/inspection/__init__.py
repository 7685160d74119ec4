"""Inspects datasets: pairs made by Retort, by reading their receipts, and any webdataset, by reading its tars."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.base import StageError
from stages.data.inspection.foreign import Foreign
from stages.data.inspection.receipted import Checked, check_shards, sha256
from stages.data.inspection.source import Source
from stages.data.records import ShardFacts
from stages.data.statistics import Moments, ks_distance
from stages.data.urls import redacted

SAME = ("sampler", "path_timesteps", "dtype", "noise", "seed", "prompts", "teacher", "device", "execution", "versions")
"""The entries of provenance that should be equal in all shards of a dataset."""

KINDS = ("missing", "unreceipted", "corrupt")
"""The kinds of damage to a shard."""


def inspect_shards(target: str, *, deep: bool = False) -> dict[str, Any]:
    """Return counts, statistics and provenance of a sealed `pairs` artifact, or of a folder or URL of shards.

    The entry `damaged` (place -> problem) lists the problems that the user has to act on: shards that are missing,
    corrupt or without a receipt, gaps between shards, and noises that occur more than once. `deep` also hashes every
    tar that has a receipt, and reads all arrays and images of other tars. Passwords and signatures are removed from
    URLs. Raises StageError if there is no shard, or if the target cannot be read.
    """
    source = Source(target)
    tars = source.tars()
    if not tars:
        raise StageError(redacted(f"{target} holds no shards: it has no .tar file"))
    report = _receipted(source, deep) if source.receipted else _foreign(source, deep)
    if report["repeated_noises"]:
        report["damaged"]["noise"] = f"{report['repeated_noises']:,} samples repeat the noise of another sample"
    report["damaged"] = {place: redacted(problem) for place, problem in report["damaged"].items()}
    return {"target": redacted(target), "deep": deep, **report}


def _receipted(source: Source, deep: bool) -> dict[str, Any]:
    checked = _without_covered(source, check_shards(source, source.tars(), deep))
    good = [one.receipt for one in checked if one.receipt]
    facts = [one.facts for one in good]
    there = {tar.path for tar in source.tars()}
    noise, prompts = _joined([one.noise for one in good]), _joined([one.prompt for one in good])
    damaged = {one.tar.path: f"{one.kind}: {one.problem}" for one in checked if one.problem is not None}
    damaged |= _prompts_damage(source, deep)
    damaged |= {} if damaged or source.sealed else _gaps(checked)
    return {
        "count": sum(one.count for one in facts),
        "shards": len(facts),
        "bytes": sum(one.bytes for one in facts),
        **{kind: sum(problem.startswith(kind) for problem in damaged.values()) for kind in KINDS},
        "extra": sum(path.endswith(".tar") and path not in there for path in source.sizes),
        "repeated_noises": len(noise) - len(np.unique(noise)),
        "prompts": {
            "distinct": len(np.unique(prompts)),
            "empty": sum(one.prompts.empty for one in facts),
            "characters": _spread([one.prompts.characters for one in facts]),
            "words": _spread([one.prompts.words for one in facts]),
        },
        "arrays": {name: _array(name, facts) for name in (facts[0].arrays if facts else {})},
        "provenance": _provenance(facts),
        "damaged": damaged,
    }


def _prompts_damage(source: Source, deep: bool) -> dict[str, str]:
    """Return the damage to the table of prompts in a sealed artifact's pool: path -> problem."""
    if not source.sealed:
        return {}
    about = source.sealed["prompts"]
    size = source.sizes.get(about["file"])
    if size is None:
        return {about["file"]: "missing: the table of prompts does not exist"}
    if size != about["bytes"]:
        return {about["file"]: f"corrupt: {size} bytes instead of {about['bytes']}"}
    if deep and sha256(source, about["file"]) != about["sha256"]:
        return {about["file"]: "corrupt: its content changed after it was sealed"}
    return {}


def _joined(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _without_covered(source: Source, checked: Iterable[Checked]) -> list[Checked]:
    """Leave out each shard whose samples are also in a longer shard of the same pool.

    This happens after `count` was raised: the short last shard of the lower count stays in the pool, because older
    artifacts list it."""
    found = list(checked)
    if source.sealed:
        return found
    longest: dict[int, int] = {}
    for one in found:
        if one.receipt:
            longest[one.receipt.first] = max(one.receipt.facts.count, longest.get(one.receipt.first, 0))
    return [
        one
        for one in found
        if not (
            one.receipt and one.tar.path.startswith("tail-") and one.receipt.facts.count < longest[one.receipt.first]
        )
    ]


def _gaps(checked: Sequence[Checked]) -> dict[str, str]:
    """Return the gaps between the intact shards of a folder: place -> problem. Sealed artifacts need no such check,
    because they list their shards."""
    spans = sorted((one.receipt.first, one.receipt.facts.count, one.tar.path) for one in checked if one.receipt)
    return {
        f"before {path}": f"missing: samples {start + count} to {first - 1}"
        for (start, count, _), (first, _, path) in itertools.pairwise(spans)
        if first > start + count
    }


def _spread(parts: Sequence[Moments]) -> dict[str, float]:
    merged = Moments.merged(parts)
    return {"mean": merged.mean, "std": merged.std, "most": merged.absmax}


def _array(name: str, facts: Sequence[ShardFacts]) -> dict[str, Any]:
    with_it = [one.arrays[name] for one in facts if name in one.arrays]
    counts = np.array([one.histogram for one in with_it], dtype=np.int64).sum(0)
    channels = [Moments.merged(parts) for parts in zip(*(one.channels for one in with_it), strict=False)]
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter((one.dtype, tuple(one.shape)) for one in with_it)
    return _summary(name, kinds, Moments.merged(one.moments for one in with_it), counts, channels)


def _summary(
    name: str,
    kinds: Counter[tuple[str, tuple[int, ...]]],
    moments: Moments,
    counts: NDArray[np.int64],
    channels: Sequence[Moments] = (),
) -> dict[str, Any]:
    (dtype, shape), _ = kinds.most_common(1)[0]
    summary: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
    if len(kinds) > 1:
        summary["others"] = [f"{dtype} {'x'.join(map(str, shape))}" for dtype, shape in list(kinds)[1:20]]
    if not moments.count + moments.nonfinite:
        return summary
    summary |= {"mean": moments.mean, "std": moments.std, "absmax": moments.absmax, "nonfinite": moments.nonfinite}
    if name == "noise":
        summary["ks_distance"] = ks_distance(counts)
    if channels:
        summary["channels"] = [{"mean": one.mean, "std": one.std, "absmax": one.absmax} for one in channels]
    return {**summary, "histogram": counts.tolist()}


def _provenance(facts: Sequence[ShardFacts]) -> dict[str, Any]:
    """Return the provenance that all shards share. An entry that differs between shards becomes {"differs": values}."""
    shared: dict[str, Any] = {}
    for name in SAME:
        distinct: dict[str, Any] = {}
        for one in facts:
            value = one.provenance.get(name)
            distinct.setdefault(repr(value), value)
        values = list(distinct.values())
        if values and values != [None]:
            shared[name] = values[0] if len(values) == 1 else {"differs": values[:20]}
    seconds = [one.provenance.get("seconds") for one in facts]
    shared["solver_seconds"] = round(sum(s for s in seconds if isinstance(s, int | float)), 1)
    return shared


def _foreign(source: Source, deep: bool) -> dict[str, Any]:
    found, damaged, size = Foreign(), {}, 0
    for tar in source.tars():
        size += source.sizes[tar.path]
        try:
            found.look(source, tar, deep)
        except (OSError, ValueError) as error:
            damaged[tar.path] = f"corrupt: {error}"
    for name, count in found.unreadable.items():
        damaged[f"*.{name}"] = f"corrupt: {count:,} members are not what their name says"
    return {
        "count": found.samples,
        "shards": len(source.tars()) - sum(path in damaged for path in source.sizes),
        "bytes": size,
        "missing": 0,
        "unreceipted": 0,
        "corrupt": sum(path in damaged for path in source.sizes),
        "extra": 0,
        "members": {n: {"count": c, "bytes": found.bytes_of[n]} for n, c in found.members.most_common()},
        "incomplete": found.incomplete,
        "never_opened": found.never_opened,
        "not_looked_into": dict(found.unseen),
        "images": {f"{w}x{h}": count for (w, h), count in found.images.most_common(20)},
        "repeated_noises": len(found.noise) - len(np.unique(found.noise)),
        "prompts": {
            "distinct": len(np.unique(found.prompt)),
            "empty": found.empty,
            "characters": _spread([found.characters]),
            "words": _spread([found.words]),
        },
        "arrays": {n: _summary(n, one.kinds, one.moments, one.histogram) for n, one in found.arrays.items()},
        "provenance": {},
        "damaged": damaged,
    }
