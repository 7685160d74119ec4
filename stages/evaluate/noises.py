"""Chooses the noises of an evaluation: noises that the student was not trained on. Needs no NumPy, for planning."""

from __future__ import annotations

from dataclasses import dataclass

from stages.base import Artifact
from stages.distill import Distill, Trained
from stages.evaluate.config import Split
from stages.pairs import Pairs

VALIDATION = 2**50
"""Number of the first validation noise. No pool holds so many pairs, so nothing is trained on it or tested on it."""


@dataclass(frozen=True)
class Noises:
    """Numbers of stored pairs, and after them of noises that are in no pair: each is drawn from (seed, number)."""

    stored: range
    fresh: range

    @property
    def count(self) -> int:
        return len(self.stored) + len(self.fresh)


def held_out(pairs: Artifact, student: Artifact | None, split: Split, samples: int) -> Noises:
    """`samples` noises of the pairs' seed that the student was not trained on.

    test: the stored pairs past the last one trained on, then fresh noises past that and past all stored pairs.
    validation: fresh noises from number VALIDATION on. Test noises have lower numbers, so no sample is in both splits,
    whatever the pairs, the student and the number of samples are.
    """
    assert isinstance(pairs.stage, Pairs)
    if split == "validation":
        return Noises(range(0), range(VALIDATION, VALIDATION + samples))
    count = pairs.stage.count
    seen = max((one.count for one in trained(student) if one.pairs.seed == pairs.seed), default=0)
    stored = range(min(seen, count), count)[:samples]
    first = max(seen, count)
    return Noises(stored, range(first, first + samples - len(stored)))


def overlap(pairs: Artifact, student: Artifact) -> Trained | None:
    """What the student was trained on that has noises of `pairs`, the most of it; None if nothing has, or if the
    student was trained on `pairs` itself, whose held-out noises are known."""
    found = trained(student)
    if pairs.fingerprint in {one.pairs.fingerprint for one in found}:
        return None
    return max((one for one in found if one.pairs.seed == pairs.seed), key=lambda one: one.count, default=None)


def trained(student: Artifact | None) -> list[Trained]:
    """All that a student was trained on, in the order of its `start_from` chain, its own first."""
    if student is None:
        return []
    assert isinstance(student.stage, Distill)
    return list(student.stage.trained_on(student.inputs))
