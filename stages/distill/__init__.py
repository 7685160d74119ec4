"""Stage kind `distill`: a student trained by a method, and exported as a diffusers pipeline.

`stage` holds its settings, `train` runs them, `card` writes the model card. Methods are in `stages.methods`, the
training loop in `stages.training`.
"""

from stages.distill.stage import Distill, Trained, sources, teacher_of

__all__ = ["Distill", "Trained", "sources", "teacher_of"]
