"""The stage kind `distill`: it trains a student by a method and exports it as a diffusers pipeline.

`stage` holds the settings, `train` runs the training, and `card` writes the model card. `whole` and `difference`
export a sealed student to other formats. Methods are in `stages.methods`, and the training loop is in
`stages.training`.
"""

from stages.distill.stage import Distill, Trained, sources, teacher_of

__all__ = ["Distill", "Trained", "sources", "teacher_of"]
