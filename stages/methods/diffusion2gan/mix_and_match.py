"""False triples for the discriminator: real latents whose noise or text is another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mix_and_match(
    made: Tensor,
    real: Tensor,
    noise: Tensor,
    condition: Tensor | None,
    prompts: Sequence[str],
    share: float,
    sees_noise: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The false half of the discriminator's batch: generated latents with their noise and condition, of which each
    with probability `share` is replaced by real ones that do not belong to theirs (2405.05967, section 3.3).

    In equal parts: an unrelated target for this noise and text; this target with another's text; with another's
    noise. The paper publishes neither share nor parts. What the discriminator cannot tell from the truth is left
    out: another's noise if it sees none, another's text if that is the same, an unrelated target if only the text
    could tell and is the same; a batch of one has no other. All tensors (B, ...), none changed.
    """
    rows, device = len(real), real.device
    if not share or rows == 1:
        return made, noise, condition
    other = (torch.arange(rows) + torch.randint(1, rows, (rows,))) % rows  # never its own index
    kind = torch.randint(3, (rows,))
    same_text = torch.tensor([prompts[i] == prompts[int(j)] for i, j in enumerate(other)])
    chosen = torch.rand(rows) < share
    target = chosen & (kind == 0) & (~same_text | sees_noise)
    text = chosen & (kind == 1) & ~same_text
    swapped = chosen & (kind == 2) & sees_noise
    other, target, text, swapped = (t.to(device) for t in (other, target, text, swapped))

    def where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (no.ndim - 1)), yes, no)

    return (
        where(target, real[other], where(text | swapped, real, made)),
        where(swapped, noise[other], noise),
        condition if condition is None else where(text, condition[other], condition),
    )
