"""Mix-and-match: fake samples for the discriminator that are real latents with the wrong noise or text."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.networks.condition import Condition

TARGET, TEXT, NOISE = range(3)


def mix_and_match(
    generated: Tensor, real: Tensor, noise: Tensor, condition: Condition, share: float, sees_noise: bool
) -> tuple[Tensor, Tensor, Condition]:
    """Return the (latents, noise, condition) of the fake half of the discriminator's batch (2405.05967, section 3.3).

    Each row is replaced with probability `share` by a real latent that does not match its noise and text. Three kinds
    are equally likely: another row's latent, this row's latent with another row's text, and this row's latent with
    another row's noise. The third is used only if the discriminator takes noise (`sees_noise`). The paper publishes
    neither the share nor the probabilities.

    A real latent that matches its noise and text is never used as a fake. So if the other row has the same text, or if
    there are no texts, the third kind replaces the second. Without `sees_noise`, such a row keeps its generated latent.
    A batch of one row is not changed.

    Latents and noise are (B, C, H, W). `condition` has B rows. The inputs are not changed.
    """
    rows, device = len(real), real.device
    if rows == 1:
        return generated, noise, condition
    own = torch.arange(rows, device=device)
    other = (own + torch.randint(1, rows, (rows,), device=device)) % rows  # another row
    kind = torch.randint(3 if sees_noise else 2, (rows,), device=device)
    same_text = condition.same_rows(condition.select(other)).to(device)
    if sees_noise:
        kind = torch.where((kind == TEXT) & same_text, NOISE, kind)
    mixed = (torch.rand(rows, device=device) < share) & (~same_text | sees_noise)

    def source(which: int) -> Tensor:
        """For each row, return the row that supplies part `which`: another row if this part is mismatched."""
        return torch.where(mixed & (kind == which), other, own)

    x = torch.where(mixed.view(-1, 1, 1, 1), real[source(TARGET)], generated)
    return x, noise[source(NOISE)], condition.select(source(TEXT))
