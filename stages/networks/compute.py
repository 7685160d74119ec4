"""Where and how a worker computes. Every function that runs on a worker begins with `prepare`."""

from __future__ import annotations

import torch

from stages.base import Execution


def prepare(threads: int) -> None:
    """Set the threads of the calling thread, which a warm worker has from another stage, and switch TF32 off:
    `float32` means float32, on every GPU and whatever ran on this worker before. bf16 is the way to be fast."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def device_of(execution: Execution) -> str:
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """As it stands in records: the GPU's model, since bits differ between models."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
