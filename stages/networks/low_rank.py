"""The difference of two networks as a LoRA: low-rank factors for each linear and convolutional layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """The factors of a layer's difference: W + B A is the layer's weight with the LoRA.

    a is (r, in) and b (out, r) for a linear layer. For a convolution a is (r, in, kh, kw) and b (out, r, 1, 1)."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def product(self) -> Tensor:
        """The difference that the factors keep, in the shape of the layer's weight."""
        return (self.b.flatten(1) @ self.a.flatten(1)).view(len(self.b), *self.a.shape[1:])


def factors(difference: Tensor, rank: int) -> Factors:
    """Return the best factors of a weight's difference. Truncated SVD keeps as much as possible of its sum of squares.

    `difference` is (out, in) or (out, in, kh, kw). The rank of the factors is at most the difference's full rank."""
    flat = difference.flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    return Factors(a.view(-1, *difference.shape[1:]), b.view(*b.shape, *(1,) * (difference.ndim - 2)))


def differences(network: nn.Module, base: nn.Module, rank: int) -> dict[str, Factors]:
    """Return the factors of `network` minus `base` for each layer whose weights differ, by the layer's name.

    Both networks have the same layers. Only linear layers and convolutions without groups have factors."""
    layers = dict(network.named_modules())
    found = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            difference = layers[name].weight.detach() - layer.weight.detach()
            if difference.any():
                found[name] = factors(difference, rank)
    return found


@torch.no_grad()
def add(network: Any, lora: dict[str, Factors]) -> Any:
    """Add a LoRA to the weights of `network`, in place. Returns the network."""
    for name, layer in lora.items():
        weight = network.get_submodule(name).weight
        weight.add_(layer.product.to(weight))
    return network


def share_kept(network: nn.Module, base: nn.Module, lora: dict[str, Factors]) -> float:
    """Return the share of the squared difference of all weights, biases included, that a LoRA of `differences` keeps.

    It is 1 if the networks are equal."""
    weights = network.state_dict()
    total = sum(float((weights[name] - value).square().sum()) for name, value in base.state_dict().items())
    kept = sum(float(layer.product.square().sum()) for layer in lora.values())
    return kept / total if total else 1.0
