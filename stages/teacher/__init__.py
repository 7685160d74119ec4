"""Stage kind `teacher`: a diffusion model to distil, loaded from a folder or the hub, or trained here.

`stage` holds the settings. `layout` checks diffusers folders. `train` trains a small teacher with `autoencoder` and
`denoiser`. `shipped` holds a teacher that comes with Retort. How a teacher computes is in `stages.networks`.
"""

from stages.teacher.stage import Teacher

__all__ = ["Teacher"]
