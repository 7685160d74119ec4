"""False triples for the discriminator: real latents whose noise or text is another's."""

from __future__ import annotations

import torch
from torch import Tensor

TARGET, TEXT, NOISE = range(3)


def mix_and_match(
    made: Tensor, real: Tensor, noise: Tensor, condition: Tensor | None, share: float, sees_noise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The false half of the discriminator's batch: generated latents with their noise and condition, of which each
    with probability `share` is replaced by real ones that do not belong to theirs (2405.05967, section 3.3).

    In equal parts: an unrelated target for this noise and text; this target with another's text; with another's
    noise. The paper publishes neither share nor parts. Never is the truth called false: another's noise only for a
    discriminator that sees it, another's text only if it differs; a row for which nothing is left, and a batch of
    one, stays as it is. All tensors (B, ...), none changed.
    """
    rows, device = len(real), real.device
    if rows == 1:
        return made, noise, condition
    other = (torch.arange(rows, device=device) + torch.randint(1, rows, (rows,), device=device)) % rows  # never itself
    kind = torch.randint(3 if sees_noise else 2, (rows,), device=device)
    same_text = torch.ones(rows, dtype=torch.bool, device=device)
    if condition is not None:
        same_text = (condition == condition[other]).view(rows, -1).all(1)
    if sees_noise:
        kind = torch.where((kind == TEXT) & same_text, NOISE, kind)
    mixed = (torch.rand(rows, device=device) < share) & (~same_text | sees_noise)

    def swapped(which: int, values: Tensor) -> Tensor:
        rows_of_kind = (mixed & (kind == which)).view(-1, *[1] * (values.ndim - 1))
        return torch.where(rows_of_kind, values[other], values)

    x = torch.where(mixed.view(-1, 1, 1, 1), swapped(TARGET, real), made)
    return x, swapped(NOISE, noise), None if condition is None else swapped(TEXT, condition)
