"""Stage kind `perceptual`: a VGG trained on latents (or images) and calibrated on triplets, for LPIPS losses.

`stage` holds its settings, `train` classifies and then calibrates, `importing` converts published weights. The network
and its distance are in `stages.networks`, the losses made of it in `stages.losses`.
"""

from stages.perceptual.stage import Perceptual

__all__ = ["Perceptual"]
