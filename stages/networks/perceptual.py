"""A perceptual network on disk, and the distance that it defines: LPIPS, in latents or in pixels."""

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
DEVIATION = 2.0
"""Latents whose standard deviation is this many times too large or too small were probably not scaled: Stable
Diffusion's are 5.5 times too large without their scaling factor, SDXL's 7.7 times."""


@dataclass(frozen=True)
class About:
    """What a perceptual network is. `std`: of what it was trained on; `trunk`: trained, or random, or where it is
    from; `images`: the set that it was trained on; `licence`: of the weights."""

    space: Space
    channels: int
    width: int
    trunk: str
    std: float = 1.0
    licence: str = "apache-2.0"
    images: str = ""

    @property
    def name(self) -> str:
        """As it stands in reports: `latent_lpips_digit_scenes`. A network of one's own is never called LPIPS alone."""
        return "_".join(filter(None, [self.space.removesuffix("s"), "lpips", self.images]))

    def __post_init__(self) -> None:
        if self.space not in get_args(Space) or not 0 < self.std < math.inf:
            raise ValueError(f"space has to be latents or pixels and std above 0, not {self.space!r} and {self.std!r}")


class LPIPS(nn.Module):
    """d(x0, x1) = sum_k mean_hw w_k . (f_k(x0) / |f_k(x0)| - f_k(x1) / |f_k(x1)|)^2, over the five taps f_k of a VGG,
    with weights w_k >= 0 (Zhang et al. 2018, 1801.03924, eq. 1; in latents: 2405.05967, section 3.1).

    Frozen. Gradients pass to both inputs; for one that needs none, nothing is kept.
    """

    def __init__(self, trunk: VGG, heads: list[Tensor], about: About) -> None:
        super().__init__()
        self.about = about
        self.taps = trunk.taps()
        self.heads = nn.ParameterList([nn.Parameter(head.clone().reshape(1, -1, 1, 1), False) for head in heads])
        self.smallest = 2 ** sum(isinstance(layer, nn.MaxPool2d) for layer in self.taps.modules())
        self._looked = about.space == "pixels"  # whose range every caller knows

    @classmethod
    def load(cls, folder: Path) -> LPIPS:
        """The network sealed in a `perceptual` artifact, or imported. Raises StageError for any other folder."""
        trunk, heads, about = read(folder)
        if about.trunk == "random":
            log.warning("the trunk of %s is random: nothing in it was learnt but the heads", folder)
        return cls(trunk, heads, about)

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Two (B, C, H, W), latents scaled as the VAE's config says or images in [-1, 1] -> distances (B,), float32."""
        self.check(x0, x1)
        parts = [
            unit_difference(f0, f1, head).mean((1, 2))
            for f0, f1, head in zip(self.features(x0), self.features(x1), self.heads, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def features(self, x: Tensor) -> list[Tensor]:
        """The five taps of (B, C, H, W)."""
        found: list[Tensor] = []
        x = x.contiguous(memory_format=torch.channels_last)
        for block in self.taps:
            x = block(x)
            found.append(x)
        return found

    def check(self, x0: Tensor, x1: Tensor) -> None:
        """Raise StageError for shapes that do not fit; warn, once, of latents that seem not to be scaled."""
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
    """w . (f0/|f0| - f1/|f1|)^2 over channels, for features (B, C, H, W) and w (1, C, 1, 1) -> (B, H, W), float32.

    As a product of matrices, which unlike a convolution keeps nothing for the gradient of a frozen w."""
    with torch.autocast(f0.device.type, enabled=False):
        return (unit(f0) - unit(f1)).square().movedim(1, -1) @ head.flatten()


def unit(features: Tensor) -> Tensor:
    """Features (B, C, H, W) over their norm, with epsilon inside the root, in float32."""
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + EPSILON).rsqrt()


def write(folder: Path, trunk: VGG, heads: list[Tensor], about: About) -> None:
    """Write a perceptual network to `folder`: `features.*` with torchvision's names, `heads.K` (C_K,), and About."""
    tensors = {f"features.{name}": value.contiguous() for name, value in trunk.features.state_dict().items()}
    tensors |= {f"heads.{k}": head.detach().reshape(-1).contiguous() for k, head in enumerate(heads)}
    save_file({name: value.cpu() for name, value in tensors.items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def about_of(folder: Path) -> About:
    """What is written beside the weights."""
    return About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def read(folder: Path) -> tuple[VGG, list[Tensor], About]:
    """What `write` wrote: the trunk in evaluation mode, the heads. Raises StageError, with what was expected."""
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
        raise StageError(f"{folder / WEIGHTS} has no {error}: it is not what {ABOUT} says") from None
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise StageError(f"{folder} is not a perceptual network that can be read: {error}") from None
    for k, (head, channels) in enumerate(zip(heads, trunk.tap_channels, strict=True)):
        if head.shape != (channels,) or not 0 <= float(head.min()) <= float(head.max()) < math.inf:  # nor nan
            raise StageError(
                f"{folder}: head {k} has to be {channels} weights, none of them negative, with which a distance could "
                "be negative, and all finite"
            )
    return trunk.eval(), heads, about
