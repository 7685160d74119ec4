"""Stage kind `teacher`: a diffusion model to distil, loaded from a folder or hub id, or trained here.

`stage` holds its settings, `layout` checks a diffusers folder, `train` and its two networks' trainings make a small
teacher, `shipped` is one that comes with Retort. How a teacher computes is in `stages.networks`.
"""

from stages.teacher.stage import Teacher

__all__ = ["Teacher"]
