"""Where and how a worker computes. Every function that runs on a worker begins with `prepare`."""

from __future__ import annotations

import torch
from torch import nn

from stages.base import Execution


def prepare(threads: int) -> None:
    """Set the threads of the calling thread, which a warm worker has from another stage, and switch TF32 off:
    `float32` means float32, on every GPU and whatever ran on this worker before. bf16 is the way to be fast."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def checkpoint_activations(module: nn.Module) -> None:
    """Let each of diffusers' models in `module` compute its activations again in the backward pass."""
    from diffusers import ModelMixin  # a second to import, for those who ask for it

    for model in module.modules():
        if isinstance(model, ModelMixin):
            model.enable_gradient_checkpointing()


def device_of(execution: Execution) -> str:
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """As it stands in records: the GPU's model, since bits differ between models."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
