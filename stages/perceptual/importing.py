"""Converts published perceptual networks to Retort's format.

These are E-LatentLPIPS networks (Kang et al. 2024, 2405.05967) for the latents of five models
(https://github.com/mingukkang/elatentlpips, CC BY-NC 4.0).

Checkpoints are read with `torch.load(weights_only=True)`, which runs no code of the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.base import StageError
from stages.data.files import fsync_folder, publish, sha256_of, temporary_of

if TYPE_CHECKING:
    from torch import Tensor

    from stages.networks.perceptual import About


class Latents(NamedTuple):
    """The inputs of a published network: (z - shift) * scale, for the output z of the model's VAE encoder."""

    model: str
    channels: int
    scale: float
    shift: float = 0.0


PUBLISHED = {
    "sd15": Latents("Stable Diffusion 1.5", 4, 0.18215),
    "sd21": Latents("Stable Diffusion 2.1", 4, 0.18215),
    "sdxl": Latents("Stable Diffusion XL", 4, 0.13025),
    "sd3": Latents("Stable Diffusion 3", 16, 1.5305, 0.0609),
    "flux": Latents("FLUX.1", 16, 0.3611, 0.1159),
}
SITE, LICENCE = "https://github.com/mingukkang/elatentlpips", "cc-by-nc-4.0"
REPOSITORY, FOLDER, ENDING = "Mingguksky/elatentlpips", "elatentlpips_ckpt", "_latest_vgg16_tuned.pth"
FIRST = "net.slice1.0.weight"


def download(name: str) -> Path:
    """Download a published checkpoint to the hub client's cache, and return its path. `name` is a key of PUBLISHED.

    Raises StageError if it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # no warning at each retry; the error below is enough
    file = f"{FOLDER}/{name}{ENDING}"
    try:
        return Path(hf_hub_download(REPOSITORY, file))
    except Exception as error:  # the hub's client raises many kinds; all mean: not reached, or not found
        raise StageError(
            f"the weights of {name} cannot be downloaded ({type(error).__name__}); fetch "
            f"{hf_hub_url(REPOSITORY, file)} on a machine with a network, and give the file's path instead of its name"
        ) from error


def import_weights(source: Path, out: Path) -> None:
    """Convert the published checkpoint `source` to the folder `out`, which `networks.perceptual.read` reads.

    The checkpoint holds a trunk and calibrated heads. `out` is written completely or not at all. Raises StageError if
    the checkpoint holds anything else.
    """
    from stages.networks import perceptual
    from stages.networks.vgg import VGG

    loaded = _load(source)
    channels, width = _first_convolution(source, loaded)
    layout = _layout(channels, width)
    _compare(source, loaded, {published: shape for published, (_, shape) in layout.items()})
    tensors = {own: loaded[published] for published, (own, _) in layout.items()}
    trunk = VGG(channels, width)
    heads = [tensors.pop(f"heads.{k}") for k in range(len(trunk.tap_channels))]
    for k, head in enumerate(heads):
        if not bool(((head >= 0) & head.isfinite()).all()):
            raise StageError(f"{source}: lins.{k} has weights that are negative or not finite")
    trunk.load_state_dict(tensors)
    origin = f"elatentlpips, {source.name}, sha256 {sha256_of(source)}"
    about = perceptual.About("latents", channels, width, origin, licence=LICENCE, images="imagenet")
    temporary = temporary_of(out)
    try:
        temporary.mkdir(parents=True)
        perceptual.write(temporary, trunk, heads, about)
        (temporary / "README.md").write_text(_card(source, about), encoding="utf-8")
        fsync_folder(temporary)
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(source: Path) -> dict[str, Tensor]:
    import torch

    try:
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the loader raises many kinds, and UnpicklingError for code
        raise StageError(
            f"{source} cannot be read ({type(error).__name__}): it is damaged, it is not a file of torch.save, or it "
            "holds more than tensors. Such a file is refused, because loading it could run any code"
        ) from None
    if isinstance(loaded, dict) and "state_dict" in loaded:
        raise StageError(
            f"{source} holds a `state_dict`, like the published classifiers (NAME_latent_vgg16.pth.tar): these have no "
            f"calibrated heads; expected NAME{ENDING}, which has trunk and heads"
        )
    if not isinstance(loaded, dict):
        raise StageError(f"{source} holds no mapping of names to tensors; expected one, as in NAME{ENDING}")
    others = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:  # torch's loader lets some through, and which ones depends on its version
        raise StageError(
            f"{source} holds more than tensors: {_some(others)}; expected only tensors, as in NAME{ENDING}"
        )
    return loaded


def _first_convolution(source: Path, loaded: dict[str, Tensor]) -> tuple[int, int]:
    """Return the input and output channels of the first convolution. Raises StageError."""
    if FIRST not in loaded:
        raise StageError(
            f"{source} is not a published E-LatentLPIPS checkpoint: expected {FIRST} and other tensors net.* and "
            f"lins.*, found {_some(loaded)}"
        )
    shape, allowed = tuple(loaded[FIRST].shape), sorted({latents.channels for latents in PUBLISHED.values()})
    if len(shape) != 4 or shape[1] not in allowed:
        raise StageError(
            f"{source}: {FIRST} has shape {shape}; expected (64, C, 3, 3), where C is the number of latent channels, "
            f"{' or '.join(map(str, allowed))}; a network for images has C = 3"
        )
    return shape[1], shape[0]


def _layout(channels: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> (name in Retort's file, shape). The heads are published twice, as lin0 and as lins.0."""
    import torch

    from stages.networks.vgg import TAP_ENDS, VGG

    with torch.device("meta"):
        trunk = VGG(channels, width)
    layout = {}
    for name, value in trunk.features.state_dict().items():
        place = int(name.partition(".")[0])
        block = 1 + sum(place >= end for end in TAP_ENDS["latents"])
        layout[f"net.slice{block}.{name}"] = (f"features.{name}", tuple(value.shape))
    for k, size in enumerate(trunk.tap_channels):
        for published in (f"lin{k}", f"lins.{k}"):
            layout[f"{published}.model.1.weight"] = (f"heads.{k}", (1, size, 1, 1))
    return layout


def _compare(source: Path, loaded: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = expected.keys() - loaded.keys(), loaded.keys() - expected.keys()
    both = sorted(expected.keys() & loaded.keys())
    shapes = {name: tuple(loaded[name].shape) for name in both if tuple(loaded[name].shape) != expected[name]}
    problems = [
        *([f"it lacks {_some(missing)}"] if missing else []),
        *([f"it has {_some(unexpected)}, which were not expected"] if unexpected else []),
        *([f"{name} has shape {found}, expected {expected[name]}" for name, found in list(shapes.items())[:1]]),
        *([f"{len(shapes) - 1} more have a wrong shape"] if len(shapes) > 1 else []),
    ]
    if problems:
        raise StageError(f"{source} is not a published E-LatentLPIPS checkpoint: {'; '.join(problems)}")


def _some(names: Collection[Any], shown: int = 2) -> str:
    listed = sorted(map(str, names))
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return (", ".join(listed[:shown]) or "nothing") + more


def _card(source: Path, about: About) -> str:
    latents = PUBLISHED.get(source.name.removesuffix(ENDING))
    inputs = f"latents of {about.channels} channels, scaled as their VAE's config says"
    if latents and latents.channels == about.channels:
        z = f"(z - {latents.shift})" if latents.shift else "z"
        inputs = f"latents of {latents.model}: {z} * {latents.scale}, where z is the output of its VAE encoder"
    return f"""---
license: {about.licence}
---
# E-LatentLPIPS

A perceptual distance for {inputs}.

Weights by Minguk Kang, published at {SITE} under the licence CC BY-NC 4.0
(https://creativecommons.org/licenses/by-nc/4.0/): keep this notice, and do not use them commercially. They belong to
"Distilling Diffusion Models into Conditional GANs" (Kang et al. 2024, https://arxiv.org/abs/2405.05967). Its author
trained them again for that repository.

Changes by `retort import-weights`: tensors are renamed, and heads are flattened and written once. The numbers are as
published. Source file: {about.trunk.removeprefix("elatentlpips, ")}.
"""
