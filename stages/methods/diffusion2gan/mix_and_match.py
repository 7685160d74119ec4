"""Mix-and-match: fake triples for the discriminator, made of real latents with the wrong noise or text."""

from __future__ import annotations

import torch
from torch import Tensor

TARGET, TEXT, NOISE = range(3)


def mix_and_match(
    generated: Tensor, real: Tensor, noise: Tensor, condition: Tensor | None, share: float, sees_noise: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the (latents, noise, condition) of the fake half of the discriminator's batch (2405.05967, section 3.3).

    Each generated latent is replaced with probability `share` by a real latent that does not match its noise and text.
    It is another row's latent, or this row's latent with another row's text or noise. All kinds that are possible for
    the batch are equally likely. The paper publishes neither the share nor the probabilities.

    A matching triple is never called fake. The noise is swapped only if the discriminator takes noise (`sees_noise`),
    and the text only if the other text differs. Rows without a possible mismatch keep the generated latent, as does a
    batch of one. latents and noise are (B, C, H, W), condition is (B, ...) or None. The inputs are not changed.
    """
    rows, device = len(real), real.device
    if rows == 1:
        return generated, noise, condition
    other = (torch.arange(rows, device=device) + torch.randint(1, rows, (rows,), device=device)) % rows  # another row
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

    x = torch.where(mixed.view(-1, 1, 1, 1), swapped(TARGET, real), generated)
    return x, swapped(NOISE, noise), None if condition is None else swapped(TEXT, condition)
