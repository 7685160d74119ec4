"""Stage kind `latents`: an image set, encoded by the teacher's VAE.

`stage` holds the settings and `encoding` does the work. Image sets are in `stages.data.images`.
"""

from stages.latents.stage import Latents

__all__ = ["Latents"]
