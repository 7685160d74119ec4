"""Stage kind `teacher`: loads a diffusion model to distil from a folder or the hub, or trains one.

`stage` holds the settings. `train` trains a small teacher with `autoencoder` and `denoiser`. `lora` fuses a LoRA into a
pipeline. `exact` encodes the images of an exact teacher. `shipped` holds a teacher that is installed with Retort. The
networks, and the checks of diffusers folders, are in `stages.networks`.
"""

from stages.teacher.stage import Teacher

__all__ = ["Teacher"]
