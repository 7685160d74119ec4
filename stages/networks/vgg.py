"""The trunk of LatentLPIPS: VGG-16 that looks at latents, and what it is trained as, a classifier."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.vgg import make_layers

from stages.base import StageError

Space = Literal["latents", "pixels"]

REMOVED_POOLS = (6, 13, 23)
"""Places of the first three max-pools in torchvision's vgg16_bn."""
TAP_ENDS: dict[Space, tuple[int, ...]] = {"latents": (7, 14, 24, 34, 44), "pixels": (6, 13, 23, 33, 43)}
"""Where each tapped block ends: in latents after its pool, which for the first three is none; in pixels, as in
LPIPS (Zhang et al. 2018, 1801.03924), before it."""


class VGG(nn.Module):
    """torchvision's `vgg16_bn.features`, its keys and places kept, `width` channels in the first block instead of 64.

    In `latents`, an eighth as wide as images, the first three max-pools are removed and the first convolution takes
    the latent's channels (Kang et al. 2024, 2405.05967, section 3.1). In `pixels` the network is the stock one.
    """

    def __init__(self, channels: int, width: int = 64, space: Space = "latents") -> None:
        super().__init__()
        self.channels, self.width, self.space = channels, width, space
        plan: list[str | int] = []
        for factor, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            plan += [*[factor * width] * convolutions, "M"]
        self.features = make_layers(plan, batch_norm=True)
        self.features[0] = nn.Conv2d(channels, width, 3, padding=1)
        if space == "latents":
            for place in REMOVED_POOLS:
                self.features[place] = nn.Identity()
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:  # as torchvision's VGG
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    @property
    def tap_channels(self) -> list[int]:
        """Channels of the five taps."""
        return [factor * self.width for factor in (1, 2, 4, 8, 8)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the last block's (B, 8 width, h, w)."""
        features: Tensor = self.features(x)
        return features

    def taps(self) -> nn.ModuleList:
        """The five blocks that are tapped, frozen, each taking what the one before puts out: batch norms folded into
        their convolutions, weights in channels-last order. A copy: this network stays as it is."""
        blocks, start = nn.ModuleList(), 0
        for end in TAP_ENDS[self.space]:
            blocks.append(_folded([copy.deepcopy(layer) for layer in self.features[start:end]]))
            start = end
        return blocks.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _folded(layers: list[nn.Module]) -> nn.Sequential:
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = kept.pop()
            assert isinstance(convolution, nn.Conv2d)
            kept.append(fuse_conv_bn_eval(convolution.eval(), layer.eval()))
        elif not isinstance(layer, nn.Identity):
            kept.append(layer)
    return nn.Sequential(*kept)


class Classifier(nn.Module):
    """VGG's own head over the trunk: a 7 x 7 average, or the map itself where it is smaller, and three linear layers
    with dropout, of 64 `width` units. Several labels share them, each with logits of its own."""

    def __init__(self, trunk: VGG, classes: dict[str, int], size: tuple[int, int], dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk, self.classes = trunk, classes
        halvings = sum(isinstance(layer, nn.MaxPool2d) for layer in trunk.features)
        pooled, hidden = [min(7, side >> halvings) for side in size], 64 * trunk.width
        if not all(pooled):
            (height, width), least = size, 2**halvings
            raise StageError(
                f"{trunk.space} of {height} x {width} are too small for the network's pools: {least} a side at least"
            )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(tuple(pooled)),
            nn.Flatten(),
            *(nn.Linear(trunk.tap_channels[-1] * pooled[0] * pooled[1], hidden), nn.ReLU(inplace=True)),
            *(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(hidden, sum(classes.values())),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, channels, H, W) -> for each label, logits (B, its classes)."""
        logits = self.head(self.trunk(x)).split(list(self.classes.values()), dim=1)
        return dict(zip(self.classes, logits, strict=True))
