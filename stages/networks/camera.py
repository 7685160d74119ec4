"""The camera as a further condition of a U-Net, for the score of renders (Wang et al. 2023, 2305.16213, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CAMERA = "camera"
"""The name of the condition's tensor: camera-to-world matrices (B, 16), row by row. Zeros stand for no camera."""


class CameraEmbedding(nn.Module):
    """Embeds a camera and a class. It replaces a U-Net's class embedding, and uses that one for the class. The
    weights of its last layer are zero at first.

    The U-Net adds the embedding to that of the timestep. Its argument `class_labels` is (the labels or None, cameras).
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.classes = unet.class_embedding
        width = unet.time_embedding.linear_2.out_features
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(16, width), nn.SiLU(), last)
        self.to(next(unet.parameters()).device)

    def forward(self, seen: tuple[Tensor | None, Tensor]) -> Tensor:
        labels, cameras = seen
        embedded: Tensor = self.layers(cameras)
        return embedded if self.classes is None else embedded + self.classes(labels)


def add_camera(unet: Any) -> Any:
    """Give a diffusers U-Net the camera as a further input, in place. It must then be called with `labels`."""
    unet.class_embedding = CameraEmbedding(unet)
    return unet


def labels(classes: Tensor | None, camera: Tensor | None) -> Any:
    """Return the `class_labels` of a U-Net. `camera` is None if `add_camera` has not changed the U-Net."""
    return classes if camera is None else (classes, camera)


def dropped(camera: Tensor, probability: float) -> Tensor:
    """Set each row of `camera` (B, 16) to zero with the given probability."""
    kept = (torch.rand(len(camera)) >= probability).to(camera)
    return camera * kept[:, None]
