"""Stage kind `perceptual`: a VGG trained on latents or images and calibrated on triplets, for LPIPS losses.

`stage` holds the settings. `train` trains the classifier and then calibrates it. `importing` converts published
weights. The network and its distance are in `stages.networks`, and the losses that use it in `stages.losses`.
"""

from stages.perceptual.stage import Perceptual

__all__ = ["Perceptual"]
