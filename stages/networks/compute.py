"""Where and how a worker computes. Every function that runs on a worker begins with `prepare`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from stages.base import Execution

log = logging.getLogger(__name__)

ATTENTION_KERNELS = {
    SDPBackend.MATH: cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
}
"""And whether this process may use it now, on a CPU as well."""


def prepare(threads: int) -> None:
    """Set the threads of the calling thread, which a warm worker has from another stage, and switch TF32 off:
    `float32` means float32, on every GPU and whatever ran on this worker before. bf16 is the way to be fast."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def checkpoint_activations(module: nn.Module) -> None:
    """Let each of diffusers' models in `module` compute its activations again in the backward pass."""
    from diffusers import ModelMixin  # a second to import, for those who ask for it

    models = [model for model in module.modules() if isinstance(model, ModelMixin)]
    if not models:
        log.warning("gradient_checkpointing: nothing here can compute its activations again; it makes no difference")
    for model in models:
        model.enable_gradient_checkpointing(_checkpoint)


def _checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """PyTorch's, which remembers autocast and random numbers, but not the choice of attention kernels: of what was
    computed with those that have a second derivative, other activations would come back than went."""
    kernels = [kernel for kernel, chosen in ATTENTION_KERNELS.items() if chosen()]

    def computed(*arguments: Any) -> Any:
        with sdpa_kernel(kernels):
            return function(*arguments)

    return checkpoint(computed, *arguments, use_reentrant=False)


def device_of(execution: Execution) -> str:
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """As it stands in records: the GPU's model, since bits differ between models."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
