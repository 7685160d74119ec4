"""Distances between latents that are computed on decoded images. Latent metrics avoid this decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.base import StageError


class Decoded(nn.Module):
    """d(decode(output), decode(target)). Gradients flow to the output, and to the target if it requires gradients."""

    def __init__(self, decode: Callable[[Tensor], Tensor], metric: nn.Module) -> None:
        super().__init__()
        self.decode, self.metric = decode, metric

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the distances (B,) of two batches of scaled latents (B, C, h, w)."""
        image = self.decode(output)
        with torch.set_grad_enabled(target.requires_grad):
            wanted = self.decode(target)
        distance: Tensor = self.metric(image, wanted)
        return distance


class PublishedLPIPS(nn.Module):
    """LPIPS of the lpips package (Zhang et al. 2018, 1801.03924), frozen. torchvision downloads its trunk's weights.

    Raises StageError if the weights are neither in the cache nor can be downloaded.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        import lpips

        try:
            self.metric: Any = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
        except (OSError, RuntimeError) as error:  # no internet connection; a file with a wrong hash
            raise StageError(
                f"the {net} weights of the lpips package's trunk cannot be downloaded ({error}); copy them to "
                "torch.hub's folder from a machine with an internet connection, or use `pixel_lpips` with a "
                "`perceptual` stage that has `space: pixels`"
            ) from error

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return the distances (B,) of two batches of images (B, 3, H, W) in [-1, 1]."""
        distance: Tensor = self.metric(x0, x1)
        return distance.flatten()
