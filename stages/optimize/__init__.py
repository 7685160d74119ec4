"""The stage kind `optimize`: it distils a teacher's score into objects, called particles.

`stage` holds the settings and `train` runs the training. `objectives` are the losses, `representations` the kinds of
objects. Networks that make images from noise are in `stages.distill`.
"""

from stages.optimize.stage import Optimize

__all__ = ["Optimize"]
