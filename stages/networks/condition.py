"""The condition of a denoising network, such as the encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors (rows, ...) with one row for each sample, such as text states, a mask or class numbers.

    Only the adapter that made a condition knows the names of its tensors. All other code handles it as a whole. The
    condition of an unconditional network has rows and no tensors.
    """

    rows: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.rows

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Condition:
        """Concatenate conditions that the same adapter made."""
        names = parts[0].tensors
        return cls(sum(map(len, parts)), {name: torch.cat([part.tensors[name] for part in parts]) for name in names})

    def select(self, index: Tensor | slice) -> Condition:
        """Return the rows at `index`, row numbers (N,) or a slice."""
        rows = len(range(self.rows)[index]) if isinstance(index, slice) else len(index)
        return Condition(rows, {name: values[index] for name, values in self.tensors.items()})

    def expand(self, rows: int) -> Condition:
        """Repeat the single row of this condition `rows` times, without copying its data."""
        return Condition(rows, {name: values.expand(rows, *values.shape[1:]) for name, values in self.tensors.items()})

    def to(self, like: Tensor) -> Condition:
        """Move all tensors to the device of `like`, and cast floating-point tensors to its dtype."""
        return Condition(
            self.rows,
            {
                name: values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)
                for name, values in self.tensors.items()
            },
        )

    def same_rows(self, other: Condition) -> Tensor:
        """Return a bool tensor (rows,): true where a row of all tensors equals that of `other`."""
        same = torch.ones(self.rows, dtype=torch.bool)
        for name, values in self.tensors.items():
            same = same.to(values.device) & (values == other.tensors[name]).view(self.rows, -1).all(1)
        return same
