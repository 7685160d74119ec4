"""From a network's images to something a person can look at."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def strip(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N, 3, H, W) in [-1, 1] side by side: (H, N * W, 3) in 0 to 255."""
    import numpy as np  # here: pages are also made of PNG files alone, by commands that import no numpy

    levels = ((images + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    return np.concatenate(levels.transpose(0, 2, 3, 1), axis=1)


def png(image: NDArray[np.uint8]) -> bytes:
    """An image (H, W, 3) as a file's content."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """A PNG file as a URL that stands for itself in a page."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
