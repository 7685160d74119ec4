"""Stage kind `latents`: encodes an image set with the teacher's VAE.

`stage` holds the settings, and `encoding` encodes the images. Image sets are in `stages.data.images`.
"""

from stages.latents.stage import Latents

__all__ = ["Latents"]
