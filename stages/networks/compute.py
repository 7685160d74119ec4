"""Device and numerical settings of a worker. Every function that runs on a worker must call `prepare` first."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
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
"""Attention kernel -> a function that says whether it is enabled in this process. It works without a GPU too."""


def prepare(threads: int) -> None:
    """Set the number of CPU threads for torch, and disable TF32.

    A reused worker keeps the settings of the stage before. Without TF32, float32 has full precision on every GPU. Use
    bf16 for speed."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def show_no_progress_bars() -> None:
    """Disable the progress bars of diffusers and transformers, which would clutter a worker's log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def remade(network: Any, device: str | None = None, **changes: Any) -> Any:
    """Return a network with `changes` in the config of `network`, and random weights.

    It is on the device of `network`, or on `device`: a network on "meta" has no weights yet."""
    config = {**network.config, **changes}
    config.pop("_use_default_values", None)  # for the keys in this list, from_config would take the class's defaults
    with torch.device(device or "cpu"):
        made = type(network).from_config(config)
    return made if device else made.to(next(network.parameters()).device)


def shared_copy(module: Any) -> Any:
    """Return a deep copy of `module` that shares its frozen parameters."""
    frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, frozen)


def tie(network: nn.Module, original: nn.Module) -> None:
    """Replace parameters of `network` by those of `original` with the same names. The two networks then share them."""
    for name, parameter in original.named_parameters():
        module, _, last = name.rpartition(".")
        setattr(network.get_submodule(module), last, parameter)


def checkpoint_activations(modules: Iterable[nn.Module]) -> None:
    """Enable gradient checkpointing in each diffusers model in `modules`. Logs a warning if there is none."""
    from diffusers import ModelMixin  # takes a second to import

    models = [model for module in modules for model in module.modules() if isinstance(model, ModelMixin)]
    if not models:
        log.warning("gradient_checkpointing has no effect: no network here supports it")
    for model in models:
        model.enable_gradient_checkpointing(_checkpoint)


def _checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call PyTorch's `checkpoint`, and use the same attention kernels in the recomputation.

    PyTorch restores autocast and the random state, but not the enabled attention kernels. A loss that restricts the
    kernels, because it needs second derivatives, would otherwise get different activations in the backward pass."""
    kernels = [kernel for kernel, chosen in ATTENTION_KERNELS.items() if chosen()]

    def computed(*arguments: Any) -> Any:
        with sdpa_kernel(kernels):
            return function(*arguments)

    return checkpoint(computed, *arguments, use_reentrant=False)


def device_of(execution: Execution) -> str:
    """Return the device that `execution` names. `auto` is `cuda` if a GPU is available, and `cpu` otherwise."""
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """Return the device's name in records: the GPU model, because results differ in bits between models, or `cpu`."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
