"""From a network's images to something a person can look at."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from numpy.typing import NDArray


def strip(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N, 3, H, W) in [-1, 1] side by side: (H, N * W, 3) in 0 to 255."""
    levels = ((images + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    return np.concatenate(levels.transpose(0, 2, 3, 1), axis=1)


def data_url(image: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a URL that stands for itself in a page."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
