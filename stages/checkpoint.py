"""A training run's state on disk: tensors as safetensors, the rest as JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from stages.data.files import fsync_folder


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Publish `folder/step-N`, then remove the checkpoints before it."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    fsync_folder(temporary)
    if final.exists():  # the same step, written by a worker that outlived its driver: the same state
        shutil.rmtree(temporary)
    else:
        temporary.replace(final)
    for old in folder.glob("step-*"):
        if old.name < final.name:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's (tensors, state), or None."""
    found = newest(folder)
    if found is None:
        return None
    state: dict[str, Any] = json.loads((found / "state.json").read_text(encoding="utf-8"))
    return load_file(found / "tensors.safetensors"), state


def newest(folder: Path) -> Path | None:
    """Its folder, or None."""
    return max(folder.glob("step-*"), default=None)


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def load_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    start = len(prefix) + 1
    module.load_state_dict({name[start:]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")})


def optimizer_tensors(prefix: str, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer whose state is tensors alone, as Adam's is."""
    return {
        f"{prefix}/{index}/{name}": torch.as_tensor(value).cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(prefix: str, optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}/"):
            index, field = name[len(prefix) + 1 :].split("/")
            state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
