"""The networks of the standard metrics, frozen: Inception (FID), DINOv2, CLIP and LPIPS.

Images are uint8 tensors (B, 3, H, W) in 0 to 255, as pipelines save them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.base import StageError
from stages.metrics.protocols import PATCH, Protocol

FOLDER = "networks"
"""The folder of the networks in a reference artifact."""
INCEPTION_SIDE = 299
DINO_SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of the channels, which DINOv2's input is normalised by."""


class Eyes:
    """The networks of a reference artifact.

    features: (B, 3, H, W) -> name of an array -> values, one row for each image. The names are inception (2048),
    inception_patch (2048) and dinov2 (D)."""

    def __init__(self, folder: Path, protocol: Protocol, device: str | torch.device) -> None:
        self.protocol, self.device = protocol, device
        self._inception = _inception(folder / "inception.safetensors", device)
        self._dinov2 = _of_transformers(folder / "dinov2", "Dinov2Model", device)
        self._clip = _of_transformers(folder / "clip", "CLIPModel", device)
        self._lpips = _lpips(folder / "lpips.safetensors", device)
        if self._clip:
            from transformers import AutoProcessor

            self._processor: Any = AutoProcessor.from_pretrained(folder / "clip", local_files_only=True)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, NDArray[np.float32]]:
        """Return the features of images, prepared as the protocol says."""
        found = {}
        scaled = self._scaled(images)
        if self._inception:
            found["inception"] = self._inception((self._to_inception(scaled).to(self.device) - 128) / 128)
            if self.protocol.patch:
                crop = middle(images, PATCH).float().to(self.device)
                found["inception_patch"] = self._inception((crop - 128) / 128)
        if self._dinov2:
            pixels = resized(scaled, DINO_SIDE, Image.Resampling.BICUBIC).to(self.device) / 255
            mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
            found["dinov2"] = self._dinov2(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]
        return {name: values.flatten(1).float().cpu().numpy() for name, values in found.items()}

    @torch.no_grad()
    def clip_scores(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64] | None:
        """Return 100 max(cos(image, prompt), 0) (B,), the CLIP score (2104.08718, as torchmetrics scales it).

        None without CLIP. The protocol's prefix is put before each prompt. Texts end after CLIP's 77 tokens."""
        if not self._clip:
            return None
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self._scaled(images)]
        texts = [self.protocol.clip_prefix + prompt for prompt in prompts]
        given = self._processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        output = self._clip(**given.to(self.device))
        cosines = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        return (100 * cosines.double().clamp(min=0)).cpu().numpy()

    @torch.no_grad()
    def diversity(self, images: Tensor) -> float | None:
        """Return the mean LPIPS distance (1801.03924) between two images of one prompt, over all pairs.

        None without LPIPS. The images are scaled as the protocol says."""
        if not self._lpips:
            return None
        scaled = self._scaled(images).to(self.device) / 127.5 - 1
        first, second = (list(index) for index in zip(*combinations(range(len(scaled)), 2), strict=True))
        return float(self._lpips(scaled[first], scaled[second]).mean())

    def _scaled(self, images: Tensor) -> Tensor:
        side = self.protocol.image_size
        if side is None or images.shape[-2:] == (side, side):
            return images
        return resized(images, side, Image.Resampling.LANCZOS).round().clamp(0, 255).to(torch.uint8)

    def _to_inception(self, images: Tensor) -> Tensor:
        if self.protocol.resize == "clean":
            return resized(images, INCEPTION_SIDE, Image.Resampling.BICUBIC)
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        scaled: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=size, align_corners=False)
        return scaled


def resized(images: Tensor, side: int, filter: Image.Resampling) -> Tensor:
    """Scale images to (B, 3, side, side), float32 in 0 to 255, with a filter of Pillow, each channel in float32.

    Pillow's filters widen when they shrink an image, so they do not alias (clean-fid, 2104.11222)."""
    channels = [
        np.asarray(Image.fromarray(channel, "F").resize((side, side), filter)).clip(0, 255)
        for channel in images.flatten(0, 1).float().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).view(*images.shape[:2], side, side)


def middle(images: Tensor, side: int) -> Tensor:
    """Return the centre crops of images, `side` pixels wide and high. Raises StageError if they are smaller."""
    height, width = images.shape[-2:]
    if min(height, width) < side:
        raise StageError(f"patch FID crops {side} pixels, but the images are {width} x {height}")
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _inception(path: Path, device: str | torch.device) -> nn.Module | None:
    """Return the Inception network of FID up to its pooled features, from (B, 3, 299, 299) in [-1, 1] to
    (B, 2048, 1, 1). The layers are torch-fidelity's."""
    if not path.exists():
        return None
    from torch_fidelity import feature_extractor_inceptionv3 as layers

    convolution = layers.BasicConv2d
    trunk = nn.Sequential(
        OrderedDict(
            Conv2d_1a_3x3=convolution(3, 32, kernel_size=3, stride=2),
            Conv2d_2a_3x3=convolution(32, 32, kernel_size=3),
            Conv2d_2b_3x3=convolution(32, 64, kernel_size=3, padding=1),
            MaxPool_1=nn.MaxPool2d(3, 2),
            Conv2d_3b_1x1=convolution(64, 80, kernel_size=1),
            Conv2d_4a_3x3=convolution(80, 192, kernel_size=3),
            MaxPool_2=nn.MaxPool2d(3, 2),
            Mixed_5b=layers.InceptionA(192, pool_features=32),
            Mixed_5c=layers.InceptionA(256, pool_features=64),
            Mixed_5d=layers.InceptionA(288, pool_features=64),
            Mixed_6a=layers.InceptionB(288),
            Mixed_6b=layers.InceptionC(768, channels_7x7=128),
            Mixed_6c=layers.InceptionC(768, channels_7x7=160),
            Mixed_6d=layers.InceptionC(768, channels_7x7=160),
            Mixed_6e=layers.InceptionC(768, channels_7x7=192),
            Mixed_7a=layers.InceptionD(768),
            Mixed_7b=layers.InceptionE_1(1280),
            Mixed_7c=layers.InceptionE_2(2048),
            AvgPool=nn.AdaptiveAvgPool2d(1),
        )
    )
    try:
        trunk.load_state_dict({k: v for k, v in load_file(path).items() if not k.startswith("fc.")})
    except RuntimeError as error:
        raise StageError(f"the inception weights are of another network: {str(error).splitlines()[0]}") from error
    return trunk.to(device).eval().requires_grad_(False)


def _of_transformers(folder: Path, kind: str, device: str | torch.device) -> Any:
    if not folder.exists():
        return None
    import transformers

    try:
        network = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(f"{folder.name} cannot be loaded as {kind}: {str(error).splitlines()[0]}") from error
    return network.to(device).eval().requires_grad_(False)


def _lpips(path: Path, device: str | torch.device) -> nn.Module | None:
    """Return LPIPS of VGG-16, with the published linear layers and the trunk in `path`."""
    if not path.exists():
        return None
    import lpips

    weights = load_file(path)
    metric: Any = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {name: f"features.{name.partition('.')[2]}" for name in metric.net.state_dict()}
    absent = next((wanted for wanted in trunk.values() if wanted not in weights), None)
    if absent:
        raise StageError(f"the lpips weights are not those of torchvision's vgg16: there is no {absent}")
    metric.net.load_state_dict({name: weights[wanted] for name, wanted in trunk.items()})
    frozen: nn.Module = metric.to(device).eval().requires_grad_(False)
    return frozen
