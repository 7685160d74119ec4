"""LoRA: students that train low-rank changes of their teacher's weights (Hu et al. 2021, 2106.09685).

The weight of a layer is W + (alpha / rank) B A. W is the teacher's, frozen and shared with it in memory. B is zero at
first. Planning imports this module, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.base import Config, StageError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.networks.low_rank import Factors

FILE = "pytorch_lora_weights.safetensors"
"""The file of LoRA weights. diffusers' `load_lora_weights` looks for this name in a folder."""
IN_FULL = "trained_in_full.safetensors"
"""The file of the weights that the teacher lacks, such as a guidance embedding. It is missing if there are none."""
UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of a U-Net that get LoRA weights by default: those of LCM-LoRA (Luo et al. 2023, 2311.05556)."""
A, B = ".lora_A.weight", ".lora_B.weight"
"""The ends of the names of a layer's two matrices."""
ADAPTER = "lora_adapter_metadata"
"""The entry of a file's metadata in which diffusers stores peft's settings, as JSON."""


class LoraSettings(Config):
    """Trains a LoRA instead of all weights. The student keeps its teacher's prediction type. Layers that the teacher
    lacks (the heads of a discriminator, a guidance embedding) are trained in full. The papers do not agree on rank and
    alpha. DMD2 (2405.14867) uses 64 and 8 for SDXL."""

    rank: int = Field(64, ge=1, description="rank of the change of each layer")
    alpha: int | None = Field(
        None,
        ge=1,
        description="the change of each layer is scaled by alpha / rank; default: the rank, which scales by 1",
    )
    targets: Annotated[list[str] | None, Field(min_length=1)] = Field(
        None,
        description="ends of the names of the layers that are changed, such as to_q; default: those of the teacher's "
        "family, for U-Nets all linear and convolution layers of attentions and residual blocks",
    )
    merged: bool = Field(
        False,
        description="whether the student is also written as a whole pipeline, with the change added to its weights",
    )

    def continues(self, other: LoraSettings) -> bool:
        """Whether weights that were trained with `other` have the same rank, scale and layers."""
        return (self.rank, self.scale, self.targets) == (other.rank, other.scale, other.targets)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha or self.rank) / self.rank


def adapted(network: Any, settings: LoraSettings, defaults: Sequence[str]) -> Any:
    """Return a copy of `network` with LoRA weights that change nothing yet.

    The copy shares the frozen parameters of `network`. Its other parameters stay trainable. `defaults` are the targets
    if `settings` give none. Raises StageError if a target matches no layer."""
    from peft import LoraConfig, inject_adapter_in_model

    from stages.networks.compute import shared_copy

    copy = shared_copy(network)
    full = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    targets = _found(copy, settings.targets, defaults)
    alpha = settings.alpha or settings.rank
    inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets), copy)
    for parameter in full:
        parameter.requires_grad_(True)
    return copy


def _found(network: Any, targets: Sequence[str] | None, defaults: Sequence[str]) -> list[str]:
    """Return the targets, or else the defaults, that are ends of names of frozen layers.

    Raises StageError if one of the targets matches no such layer, or if none of the defaults matches one."""
    from torch import nn

    names = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad
    ]
    wanted = defaults if targets is None else targets
    found = [target for target in wanted if any(f".{name}".endswith(f".{target}") for name in names)]
    missing = [target for target in wanted if target not in found]
    if not found and targets is None:
        raise StageError(f"lora.targets: a {type(network).__name__} has no default targets; give targets")
    if missing and targets is not None:
        parts = (name.split(".") for name in names)
        ends = sorted({".".join(part[-2:]) if part[-1].isdigit() else part[-1] for part in parts})
        raise StageError(
            f"lora.targets: no linear or convolution layer of the {type(network).__name__} is called "
            f"{', '.join(missing)}; it has {', '.join(ends)}"
        )
    return found


def save_lora(network: Any, settings: LoraSettings, teacher: Any, prefix: str, folder: Path) -> None:
    """Write the LoRA weights of `network` to FILE in `folder`, with `prefix` and a dot before their names.

    B is multiplied by alpha / rank, so that programs which ignore alpha get the same result. The layers that the
    network `teacher` lacks go to IN_FULL."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    known = dict(teacher.named_parameters())
    own = {name: value for name, value in network.named_parameters() if ".lora_" not in name}
    tensors = {
        FILE: {
            f"{prefix}.{name}": value for name, value in _scaled(get_peft_model_state_dict(network), settings.scale)
        },
        IN_FULL: {name: value for name, value in own.items() if name.replace(".base_layer.", ".") not in known},
    }
    for file, found in tensors.items():
        if found:
            contiguous = {name: value.detach().cpu().contiguous() for name, value in found.items()}
            save_file(contiguous, folder / file, metadata={"format": "pt"})


def load_lora(network: Any, settings: LoraSettings, prefix: str, folder: Path) -> None:
    """Load what `save_lora` wrote into `network`, which was made by `adapted` with the same settings.

    Raises StageError if layers are missing in the network or in the files."""
    from peft import set_peft_model_state_dict

    weights, own = _read(folder, prefix)
    lost: Any = set_peft_model_state_dict(network, dict(_scaled(weights, 1 / settings.scale)))
    missing = [name for name in lost.missing_keys if ".lora_" in name]
    wrong = [*missing, *lost.unexpected_keys, *network.load_state_dict(own, strict=False).unexpected_keys]
    if wrong:
        raise StageError(f"the LoRA weights in {folder} are of another network: only one of the two has {wrong[0]}")


def merge_lora(network: Any, prefix: str, folder: Path) -> None:
    """Add what `save_lora` wrote to the weights of `network`, a whole copy of the teacher's: W + B A for each layer.

    Raises StageError if layers are missing in the network."""
    from stages.networks.low_rank import Factors, add

    weights, own = _read(folder, prefix)
    unknown = network.load_state_dict(own, strict=False).unexpected_keys
    if unknown:
        raise StageError(f"the LoRA weights in {folder} are of another network, which has {unknown[0]}")
    names = [name.removesuffix(A) for name in weights if name.endswith(A)]
    add(network, {name: Factors(weights[name + A], weights[name + B]) for name in names})


def _scaled(weights: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, value * scale if name.endswith(B) else value) for name, value in weights.items())


def _read(folder: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the LoRA weights without `prefix`, and the layers that the teacher lacks."""
    from safetensors.torch import load_file

    weights = {name.removeprefix(f"{prefix}."): value for name, value in load_file(folder / FILE).items()}
    return weights, load_file(folder / IN_FULL) if (folder / IN_FULL).exists() else {}


def saved_form(lora: Mapping[str, Factors], network: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the settings of a LoRA as diffusers stores them, for the component `network`.

    The settings are those of peft's LoraConfig. They are stored because some releases of diffusers derive a wrong
    scale where layers have several ranks."""
    weights = {}
    for name, layer in lora.items():
        weights[f"{network}.{name}{A}"] = layer.a.cpu().contiguous()
        weights[f"{network}.{name}{B}"] = layer.b.cpu().contiguous()
    rank = max(layer.rank for layer in lora.values())
    fewer = {name: layer.rank for name, layer in lora.items() if layer.rank < rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": fewer,
        "alpha_pattern": fewer,
        "target_modules": list(lora),
    }
    return weights, {f"{network}.{name}": value for name, value in settings.items()}
