"""VGG-16 for latents or images: the trunk of a perceptual network, and the classifier that trains the trunk."""

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
"""Indices of the first three max-pooling layers in torchvision's `vgg16_bn.features`."""
TAP_ENDS: dict[Space, tuple[int, ...]] = {"latents": (7, 14, 24, 34, 44), "pixels": (6, 13, 23, 33, 43)}
"""The index after the last layer of each tapped block. For pixels, a block ends before its pooling layer, as in LPIPS
(Zhang et al. 2018, 1801.03924). For latents, a block ends after its pooling layer. The first three have none."""


class VGG(nn.Module):
    """torchvision's `vgg16_bn.features` with `width` channels in the first block instead of 64.

    Layers have the same indices and keys as in torchvision. For `latents`, whose sides are an eighth of the image's,
    the first three max-pooling layers are removed, and the first convolution takes the latent's channels (Kang et al.
    2024, 2405.05967, section 3.1). For `pixels` the layers are those of torchvision.
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
        """Number of channels of the five tapped features."""
        return [factor * self.width for factor in (1, 2, 4, 8, 8)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the last block, (B, 8 width, h, w), for x (B, channels, H, W)."""
        features: Tensor = self.features(x)
        return features

    def taps(self) -> nn.ModuleList:
        """Return a frozen copy of the five tapped blocks. Each takes the output of the block before.

        Batch norms are folded into the convolutions, with their running statistics. Weights are in channels-last memory
        format."""
        blocks, start = nn.ModuleList(), 0
        for end in TAP_ENDS[self.space]:
            blocks.append(_folded([copy.deepcopy(layer) for layer in self.features[start:end]]))
            start = end
        return blocks.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _folded(layers: list[nn.Module]) -> nn.Sequential:
    """Return the layers with batch norms folded into the convolutions before them, and without identities."""
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
    """A VGG classifier: the trunk, average pooling to at most 7 x 7, and three linear layers with dropout.

    The hidden layers have 64 * `width` units. `classes` maps each label to its number of classes. Each label has its
    own logits, and all share the other layers. `size` is the (height, width) of the inputs. Raises StageError if they
    are too small for the trunk's pooling layers."""

    def __init__(self, trunk: VGG, classes: dict[str, int], size: tuple[int, int], dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk, self.classes = trunk, classes
        halvings = sum(isinstance(layer, nn.MaxPool2d) for layer in trunk.features)
        pooled, hidden = [min(7, side >> halvings) for side in size], 64 * trunk.width
        if not all(pooled):
            (height, width), least = size, 2**halvings
            raise StageError(
                f"{trunk.space} of {height} x {width} are too small for the network's pooling layers: height and width "
                f"must be at least {least}"
            )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(tuple(pooled)),
            nn.Flatten(),
            *(nn.Linear(trunk.tap_channels[-1] * pooled[0] * pooled[1], hidden), nn.ReLU(inplace=True)),
            *(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(hidden, sum(classes.values())),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return label -> logits (B, number of classes), for x (B, channels, H, W)."""
        logits = self.head(self.trunk(x)).split(list(self.classes.values()), dim=1)
        return dict(zip(self.classes, logits, strict=True))
