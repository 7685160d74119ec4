"""Perceptual networks: the distance LPIPS, on latents or on images, and the files of a network."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.base import StageError
from stages.networks.vgg import VGG, Space

log = logging.getLogger(__name__)

WEIGHTS, ABOUT = "network.safetensors", "perceptual.json"
EPSILON = 1e-8
"""The constant inside the square root of the features' norm."""
DEVIATION = 2.0
"""The ratio of standard deviations above which latents are probably not scaled. Without the scaling factor, the latents
of Stable Diffusion are 5.5 times too large, and those of SDXL 7.7 times."""


@dataclass(frozen=True)
class About:
    """The description of a perceptual network, stored as perceptual.json beside its weights."""

    space: Space
    """What it compares: latents, or images (pixels)."""
    channels: int
    """Number of channels of its inputs."""
    width: int
    """Number of channels in the first block of the VGG."""
    trunk: str
    """The origin of the VGG's weights: `trained`, `random`, or a source."""
    std: float = 1.0
    """Standard deviation of the training inputs, over all elements."""
    licence: str = "apache-2.0"
    """Licence of the weights."""
    images: str = ""
    """Name of the image set that it was trained on."""

    @property
    def name(self) -> str:
        """The name in reports, such as `latent_lpips_digit_scenes`. The image set distinguishes it from plain LPIPS."""
        return "_".join(filter(None, [self.space.removesuffix("s"), "lpips", self.images]))

    def __post_init__(self) -> None:
        if self.space not in get_args(Space) or not 0 < self.std < math.inf:
            raise ValueError(f"space must be latents or pixels and std above 0, not {self.space!r} and {self.std!r}")


class LPIPS(nn.Module):
    """The perceptual distance LPIPS (Zhang et al. 2018, 1801.03924, eq. 1; on latents: 2405.05967, section 3.1).

    d(x0, x1) = sum_k mean_hw w_k . (f_k(x0) / |f_k(x0)| - f_k(x1) / |f_k(x1)|)^2

    f_k are the features of the five blocks of a VGG, and w_k >= 0 are weights of their channels, called heads. The
    network is frozen. Gradients flow to both inputs. No activations are stored for an input that needs no gradient.
    """

    def __init__(self, trunk: VGG, heads: list[Tensor], about: About) -> None:
        super().__init__()
        self.about = about
        self.taps = trunk.taps()
        self.heads = nn.ParameterList([nn.Parameter(head.clone().reshape(1, -1, 1, 1), False) for head in heads])
        self.smallest = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.taps.modules())
        self._looked = about.space == "pixels"  # images have a fixed range

    @classmethod
    def load(cls, folder: Path) -> LPIPS:
        """Load the network of a `perceptual` artifact. Raises StageError if the folder holds none."""
        trunk, heads, about = read(folder)
        if about.trunk == "random":
            log.warning("the trunk of %s has random weights: only its heads were trained", folder)
        return cls(trunk, heads, about)

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return the distances (B,), float32, of x0 and x1 (B, C, H, W).

        Latents must be multiplied by the VAE's scaling factor. Images must be in [-1, 1]. Raises StageError if the
        shapes do not fit."""
        self.check(x0, x1)
        parts = [
            unit_difference(f0, f1, head).mean((1, 2))
            for f0, f1, head in zip(self.features(x0), self.features(x1), self.heads, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features of the five blocks, each (B, C_k, h_k, w_k), for x (B, C, H, W)."""
        found: list[Tensor] = []
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.taps:
            x = block(x)
            found.append(x)
        return found

    def check(self, x0: Tensor, x1: Tensor) -> None:
        """Raise StageError if the shapes do not fit. Warn once if latents seem not to be scaled."""
        expected = self.about.channels
        if x0.shape != x1.shape or x0.ndim != 4 or x0.shape[1] != expected or min(x0.shape[2:]) < self.smallest:
            raise StageError(
                f"this perceptual network compares {self.about.space} of shape (B, {expected}, H, W), H and W at "
                f"least {self.smallest}, not {tuple(x0.shape)} with {tuple(x1.shape)}"
            )
        if self._looked or torch.compiler.is_compiling():
            return
        self._looked = True
        ratio = float(x1.detach().float().std()) / self.about.std
        if not 1 / DEVIATION < ratio < DEVIATION:
            log.warning(
                "the standard deviation of these latents is %.2f times that of what the perceptual network was "
                "trained on (%.3f): are they multiplied by the VAE's scaling factor?",
                *(ratio, self.about.std),
            )


def unit_difference(f0: Tensor, f1: Tensor, head: Tensor) -> Tensor:
    """Return w . (f0/|f0| - f1/|f1|)^2, summed over channels, (B, H, W), float32.

    Features f0 and f1 are (B, C, H, W), and the head w is (1, C, 1, 1). It is computed as a matrix product. A
    convolution would store its input for the gradient of w, although w is frozen."""
    with torch.autocast(f0.device.type, enabled=False):
        return (unit(f0) - unit(f1)).square().movedim(1, -1) @ head.flatten()


def unit(features: Tensor) -> Tensor:
    """Divide features (B, C, H, W) by sqrt(sum_c f_c^2 + EPSILON), in float32."""
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + EPSILON).rsqrt()


def write(folder: Path, trunk: VGG, heads: list[Tensor], about: About) -> None:
    """Write a perceptual network to `folder`: network.safetensors and perceptual.json.

    The tensors are `features.*`, with torchvision's names, and `heads.K` (C_K,)."""
    tensors = {f"features.{name}": value.contiguous() for name, value in trunk.features.state_dict().items()}
    tensors |= {f"heads.{k}": head.detach().reshape(-1).contiguous() for k, head in enumerate(heads)}
    save_file({name: value.cpu() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def about_of(folder: Path) -> About:
    """Read perceptual.json in `folder`."""
    return About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def read(folder: Path) -> tuple[VGG, list[Tensor], About]:
    """Read a perceptual network: the trunk in evaluation mode, the heads (C_K,), and the description.

    Raises StageError if a file is missing or wrong. The message says what was expected."""
    try:
        about = about_of(folder)
        tensors = load_file(folder / WEIGHTS)
        trunk = VGG(about.channels, about.width, about.space)
        heads = [tensors.pop(f"heads.{k}").float() for k in range(len(trunk.tap_channels))]
        trunk.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise StageError(
            f"{folder} has no {Path(error.filename or WEIGHTS).name}: it is not a perceptual network; a `perceptual` "
            f"stage or `retort import-weights` writes {ABOUT} and {WEIGHTS}"
        ) from None
    except KeyError as error:
        raise StageError(f"{folder / WEIGHTS} has no {error}: it does not match {ABOUT}") from None
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise StageError(f"{folder} is not a perceptual network that can be read: {error}") from None
    for k, (head, channels) in enumerate(zip(heads, trunk.tap_channels, strict=True)):
        if head.shape != (channels,) or not 0 <= float(head.min()) <= float(head.max()) < math.inf:  # false for nan
            raise StageError(f"{folder}: head {k} must have {channels} weights, all finite and at least 0")
    return trunk.eval(), heads, about
