"""Chooses the noises of an evaluation: noises that the student was not trained on.

Needs no NumPy, because planning uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.base import Artifact
from stages.distill import Distill, Trained
from stages.evaluate.config import Split
from stages.pairs import Pairs

VALIDATION = 2**50
"""Number of the first validation noise. Pools have fewer pairs, so these noises are never used for training or testing.
"""


@dataclass(frozen=True)
class Noises:
    """The numbers of the noises: first those of stored pairs, then those of new noises, which are in no pair. The seed
    and the number determine a noise.
    """

    stored: range
    fresh: range

    @property
    def count(self) -> int:
        return len(self.stored) + len(self.fresh)

    def part(self, start: int, stop: int) -> tuple[range, range]:
        """Return the stored and the fresh numbers among those of samples `start` to `stop` - 1."""
        after = len(self.stored)
        return self.stored[start:stop], self.fresh[max(0, start - after) : max(0, stop - after)]


def held_out(pairs: Artifact, student: Artifact | None, split: Split, samples: int) -> Noises:
    """Return `samples` noises of the pairs' seed that the student was not trained on.

    test: the last stored pairs, as far as they come after the last training pair; then new noises with higher numbers
    than all stored and training pairs. So all students get the same noises, whatever number of these pairs they hold
    out.

    validation: new noises, numbered from VALIDATION. Test noises always have lower numbers, so no noise is in both
    splits.
    """
    assert isinstance(pairs.stage, Pairs)
    if split == "validation":
        return Noises(range(0), range(VALIDATION, VALIDATION + samples))
    count = pairs.stage.count
    seen = max((one.count for one in trained(student) if one.pairs.seed == pairs.seed), default=0)
    stored = range(max(min(seen, count), count - samples), count)
    first = max(seen, count)
    return Noises(stored, range(first, first + samples - len(stored)))


def overlap(pairs: Artifact, student: Artifact) -> Trained | None:
    """Return the training pairs of the student that share the most noises with `pairs`. Shared noises need equal seeds.

    None if no noise is shared, or if the student was trained on `pairs` itself: its held-out noises are then known.
    """
    found = trained(student)
    if pairs.fingerprint in {one.pairs.fingerprint for one in found}:
        return None
    return max((one for one in found if one.pairs.seed == pairs.seed), key=lambda one: one.count, default=None)


def trained(student: Artifact | None) -> list[Trained]:
    """Return all pairs that a student was trained on: its own, then those of the students in its `start_from` chain."""
    if student is None:
        return []
    assert isinstance(student.stage, Distill)
    return list(student.stage.trained_on(student.inputs))
