"""Measures real images with the networks of the standard metrics, on a worker."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.base import Progress, StageError
from stages.data.files import files_of, sha256_of, sha256_of_all
from stages.data.hub import commit_of, snapshot
from stages.data.images.load import batches, rows
from stages.metrics.protocols import PROTOCOLS
from stages.networks.compute import device_name, device_of, prepare
from stages.networks.standard import FOLDER, Eyes
from stages.reference.stage import PATTERNS, Reference

BATCH = 32


def measure(
    stage: Reference, contents: Mapping[str, str], output: Path, threads: int
) -> Generator[Progress, None, dict[str, Any]]:
    """Copy the networks to `output`, and write the features of all images. Return counts and the weights' sha256."""
    prepare(threads)
    device = device_of(stage.execution)
    hashes = adopt(stage, contents, output / FOLDER)
    eyes = Eyes(output / FOLDER, PROTOCOLS[stage.preset], device)
    splits = (False, True)
    total = sum(1 for held_out in splits for _ in rows(stage.images, held_out=held_out))
    seen: dict[str, list[Any]] = {}
    done = 0
    for held_out in splits:
        for images in batches(stage.images, BATCH, held_out=held_out):
            for name, values in eyes.features(torch.from_numpy(images)).items():
                seen.setdefault(name, []).append(values)
            done += len(images)
            yield Progress(done, total, "images")
    for name, found in seen.items():
        np.save(output / f"{name}.npy", np.concatenate(found), allow_pickle=False)
    return {"images": done, "weights_sha256": hashes, "device": device_name(device)}


def adopt(stage: Reference, contents: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Copy the networks that a reference stage names to `folder`. Return network -> sha256 of its weights.

    Weights in PyTorch's format are converted to safetensors; no code of the file is run. Raises StageError for weights
    of another network, and for a repository that cannot be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name in ("inception", "lpips"):
        source = getattr(stage, name)
        if source:
            save_file(_tensors(Path(source)), folder / f"{name}.safetensors")
            hashes[name] = sha256_of(Path(source))
    for name in ("dinov2", "clip"):
        given = getattr(stage, name)
        if given:
            commit = commit_of(contents[f"{name}.source"])
            origin = snapshot(given.source, commit, PATTERNS) if commit else Path(given.source)
            for relative, file in files_of(str(origin), PATTERNS).items():
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name / relative)
            hashes[name] = sha256_of_all(str(folder / name), ("*.safetensors",))
    return hashes


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict. Raises StageError if the file holds anything but tensors."""
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("it holds more than the tensors of a network")
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}
    except Exception as error:  # torch and safetensors raise many kinds; all mean that it is no such file
        raise StageError(f"{path} is not a file of weights: {str(error).splitlines()[0]}") from error
