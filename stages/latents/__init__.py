"""Stage kind `latents`: an image set encoded once by the teacher's VAE.

`stage` holds its settings, `encoding` does the work. Image sets themselves are in `stages.data.images`.
"""

from stages.latents.stage import Latents

__all__ = ["Latents"]
