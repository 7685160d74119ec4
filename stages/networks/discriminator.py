"""The discriminator of Diffusion2GAN: a diffusion network with classification heads on its features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import interpolate

from stages.diffusion.schedule import Level
from stages.networks.adapter import Adapter
from stages.networks.condition import Condition
from stages.networks.lora import LoraSettings

CLEAN = Level(1.0, 0.0, 0)
"""The level at which the network is called. Its inputs are clean latents. The timestep is 0."""


class DiffusionDiscriminator(nn.Module):
    """The conditional discriminator D(c, z, x), as maps of logits (Kang et al. 2024, 2405.05967, section 3.3).

    The network is a copy of the teacher's, or has random weights. The latent x is its input. The condition c enters as
    in the teacher. The noise z enters through a convolution whose output is added to the features after the first
    layer. With `multi_scale`, the resized x also enters through a convolution after each down-sampling layer of the
    encoder.

    Each feature of `Adapter.features` has a head: group norm, SiLU and a 3x3 convolution, as in a U-Net's output layer.
    Without `multi_scale` there is only the last feature.

    The added input convolutions are initialised with zeros, so that the features are at first those of the teacher. The
    paper specifies neither the heads nor the timestep. Retort chose both.
    """

    def __init__(self, adapter: Adapter, network: Any, noise: bool = True, multi_scale: bool = True) -> None:
        """Create the discriminator from `network`, which loses its output layers.

        Raises StageError if the adapter does not support features of this network."""
        super().__init__()
        self._features = adapter.features(network, multi_scale)
        self.adapter, self.network = adapter, network
        channels = network.config["in_channels"]
        self.noise = _way_in(channels, self._features.first) if noise else None
        self.resized = nn.ModuleList(_way_in(channels, width) for width in self._features.halved)
        self.heads = nn.ModuleList(_head(width, self._features.groups) for width in self._features.channels)

    @classmethod
    def from_teacher(
        cls,
        teacher: Adapter,
        weights: Literal["teacher", "random"],
        noise: bool,
        multi_scale: bool,
        lora: LoraSettings | None = None,
    ) -> DiffusionDiscriminator:
        """Create a discriminator with a copy of the teacher's network, or with random weights.

        With `lora`, the copy shares the teacher's weights and trains LoRA weights. A random network is trained in full.
        """
        if weights == "random":
            network = teacher.random_network()
        else:
            network = teacher.lora_network(lora) if lora else teacher.student_network()
        return cls(teacher, network, noise, multi_scale)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the network's condition for `prompts`, one row for each prompt."""
        return self.adapter.encode_prompts(prompts)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> list[Tensor]:
        """Return a map of logits (B, h, w) for each feature. x and noise are (B, C, H, W)."""

        def enter(layer: nn.Module, image: Tensor, features: Tensor) -> Tensor:
            entered: Tensor = layer(interpolate(image, features.shape[2:], mode="area"))
            return entered

        first = None if self.noise is None else partial(enter, self.noise, noise)
        with self._features.listening(first, [partial(enter, layer, x) for layer in self.resized]) as features:
            self.adapter.predict(self.network, x, self.adapter.on_device(CLEAN), condition)
        return [head(feature).squeeze(1) for head, feature in zip(self.heads, features(), strict=True)]


def _way_in(channels: int, width: int) -> nn.Conv2d:
    """Return a convolution for an added input. Its weights are zero, but their gradients are not."""
    layer = nn.Conv2d(channels, width, 3, padding=1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _head(channels: int, groups: int) -> nn.Module:
    """Return a module from features (B, `channels`, h, w) to logits (B, 1, h, w)."""
    return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))
