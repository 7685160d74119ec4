"""Saves and loads training checkpoints: tensors as safetensors, other state as JSON, and the hashes of both files.

The last two checkpoints are kept. If the newest one is damaged, training resumes from the other one. The command
`sha256sum -c SHA256SUMS` in the folder of a checkpoint verifies its files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from stages.base import StageError
from stages.data.files import fsync_folder, publish, sha256_of

log = logging.getLogger(__name__)

KEPT = 2
"""The number of checkpoints that are kept."""
TENSORS, STATE, HASHES = "tensors.safetensors", "state.json", "SHA256SUMS"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint `folder/step-N` atomically, and remove all but the newest two."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / TENSORS)
    (temporary / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    (temporary / HASHES).write_bytes(_hashes(temporary))
    fsync_folder(temporary)
    if final.exists():  # another worker, whose driver died, has saved the same step with the same state
        shutil.rmtree(temporary)
    else:
        publish(temporary, final)
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load (tensors, state) of the newest intact checkpoint. Returns None if there is no checkpoint.

    Removes damaged checkpoints that are newer, and warns. Raises StageError if all checkpoints are damaged. Training
    does not start again from the first step then, because it may have taken weeks and the user may have a copy."""
    damaged: dict[Path, str] = {}
    for path in _newest_first(folder):
        damage = _damage(path)
        if damage is None:
            for newer, why in damaged.items():
                log.warning(
                    "the checkpoint %s is damaged (%s) and is removed; training resumes from %s", newer, why, path
                )
                shutil.rmtree(newer, ignore_errors=True)
            state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
            return load_file(path / TENSORS), state
        damaged[path] = damage
    if damaged:
        listed = "; ".join(f"{path} ({why})" for path, why in damaged.items())
        raise StageError(
            f"every checkpoint of this training is damaged: {listed}. Restore one from a copy, or remove {folder} to "
            "start from the first step"
        )
    return None


def newest(folder: Path) -> Path | None:
    """Return the folder of the newest checkpoint, or None. The hashes are not checked."""
    return next(iter(_newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def _hashes(checkpoint: Path) -> bytes:
    return "".join(f"{sha256_of(checkpoint / name)}  {name}\n" for name in (TENSORS, STATE)).encode()


def _damage(checkpoint: Path) -> str | None:
    """Describe the damage to the checkpoint's files, or return None if they match their hashes."""
    try:
        intact = (checkpoint / HASHES).read_bytes() == _hashes(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    return None if intact else f"its files do not match {HASHES}"


def module_tensors(prefix: str, module: nn.Module, without: Collection[str]) -> dict[str, Tensor]:
    """Return the module's state as `prefix/NAME` -> tensor on the CPU. The parameters in `without` are left out."""
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in without}
    return {f"{prefix}/{name}": tensor.detach().cpu() for name, tensor in state.items()}


def load_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor], without: Collection[str]) -> None:
    """Load the module's state from `module_tensors` with the same prefix and `without`.

    Raises StageError if the tensors have other names or shapes than the module's."""
    start = len(prefix) + 1
    state = {name[start:]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
    try:
        module.load_state_dict({**state, **{name: module.get_parameter(name) for name in without}})
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise StageError(
            "the checkpoint was made by another version of Retort or of a library: "
            f"{prefix} does not fit ({first:.200}). Finish the run with that version, or remove the stage's "
            "checkpoints to start from the first step"
        ) from None


def optimizer_tensors(prefix: str, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as `prefix/PARAMETER/NAME` -> tensor. All state must be tensors, as in Adam."""
    return {
        f"{prefix}/{index}/{name}": torch.as_tensor(value).cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(prefix: str, optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the optimizer's state from `optimizer_tensors` with the same prefix."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}/"):
            index, field = name[len(prefix) + 1 :].split("/")
            state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
