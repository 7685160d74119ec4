"""Distances between decoded images, for latents: what a latent metric saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.base import StageError


class Decoded(nn.Module):
    """d(decode(x0), decode(x1)): gradients pass through the decoder to the output, none are kept for the target."""

    def __init__(self, decode: Callable[[Tensor], Tensor], metric: nn.Module) -> None:
        super().__init__()
        self.decode, self.metric = decode, metric

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Two (B, C, h, w), scaled latents -> (B,)."""
        image = self.decode(output)
        with torch.set_grad_enabled(target.requires_grad):
            wanted = self.decode(target)
        distance: Tensor = self.metric(image, wanted)
        return distance


class PublishedLPIPS(nn.Module):
    """The lpips package's LPIPS (Zhang et al. 2018, 1801.03924), its trunk downloaded by torchvision. Frozen.

    Raises StageError when the trunk's weights can neither be found nor downloaded.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        import lpips

        try:
            self.metric: Any = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
        except (OSError, RuntimeError) as error:  # not reached; not what it should be
            raise StageError(
                f"the {net} weights of the lpips package's trunk cannot be downloaded ({error}); put them into "
                "torch.hub's folder where there is a network, or use `pixel_lpips` with a `perceptual` stage of "
                "`space: pixels`"
            ) from error

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] -> (B,)."""
        distance: Tensor = self.metric(x0, x1)
        return distance.flatten()
