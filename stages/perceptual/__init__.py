"""Stage kind `perceptual`: trains a VGG network for LPIPS losses.

`stage` holds the settings. `train` trains the network to classify latents or images, and then calibrates it on
triplets of images. `importing` converts published weights. The network is in `stages.networks`, and the losses that
use it are in `stages.losses`.
"""

from stages.perceptual.stage import Perceptual

__all__ = ["Perceptual"]
