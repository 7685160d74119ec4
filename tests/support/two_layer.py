"""The smallest possible family of architectures. It shows a minimal adapter: a flow of two layers with three channels,
and a condition of two tensors. Retort finds it only through the entry point `retort.teachers`: see
tests/stages/networks/test_adapter.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from stages.networks.adapter import Adapter
from stages.networks.condition import Condition

WORDS = 16


class TwoLayer(ModelMixin, ConfigMixin):
    """u at the level s (B,) of a flow, conditioned on words (B, WORDS), their number (B,) and perhaps w (B,)."""

    @register_to_config
    def __init__(self, in_channels: int = 3, out_channels: int = 3, sample_size: int = 16, takes_w: bool = False):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.of_words, self.of_number = nn.Linear(WORDS, 8), nn.Embedding(8, 8)
        self.of_w = nn.Linear(1, 8, bias=False) if takes_w else None
        self.proj_out = nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, z: Tensor, s: Tensor, words: Tensor, number: Tensor, w: Tensor | None) -> Tensor:
        shift = self.of_words(words) + self.of_number(number) + s[:, None]
        if self.of_w is not None:
            shift = shift + self.of_w(w[:, None])
        return self.proj_out(torch.tanh(self.conv_in(z) + shift[:, :, None, None]))


class TwoLayerFlow(Adapter):
    COMPONENTS: ClassVar[dict[str, str | None]] = {"network": None, "scheduler": None}
    FILES = (
        "model_index.json",
        "network/config.json",
        "network/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    )
    SUPPORTS = "two layers"
    NETWORK, HEAD, FLOW, down_sampling = "network", "proj_out", True, 1

    @classmethod
    def guidance_error(cls, folder: Path, as_input: bool) -> str | None:
        return None

    @classmethod
    def network_class(cls) -> Any:
        return TwoLayer

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        words = torch.zeros(len(prompts), WORDS, device=self.device)
        for row, prompt in zip(words, prompts, strict=True):
            for word in prompt.split():
                row[sum(map(ord, word)) % WORDS] += 1
        return Condition(len(prompts), {"words": words, "number": words.sum(1).long()})

    @classmethod
    def predict(cls, network: Any, z: Tensor, level: Any, condition: Condition, w: Tensor | None = None) -> Tensor:
        given = condition.to(z).tensors
        s = torch.as_tensor(level.sigma, dtype=z.dtype, device=z.device).flatten().expand(len(z))
        return network(z, s, given["words"], given["number"], w)

    def with_guidance_embedding(self, network: Any) -> Any:
        embedded = TwoLayer.from_config({**network.config, "takes_w": True})
        embedded.load_state_dict(network.state_dict(), strict=False)
        nn.init.zeros_(embedded.of_w.weight)
        return embedded

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_with_gradient(latents).float().cpu().clamp(-1, 1)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        return 2 * latents

    def encode(self, images: Tensor) -> Tensor:
        return images.to(self.device).float() / 2

    def save_pipeline(self, network: Any, scheduler: Any, folder: Path) -> None:
        save(network, scheduler, folder)

    def plain_error(self, form: Any, grid: Any, scheduler: Any) -> str:
        return "diffusers has no pipeline of two layers"

    def usage(self, form: Any, scheduler: str, lora: bool = False) -> str:
        raise AssertionError("plain_error says that there is none")


def save(network: TwoLayer, scheduler: Any, folder: Path) -> None:
    network.save_pretrained(folder / "network")
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "TwoLayerPipeline", "network": [__name__, "TwoLayer"], "scheduler": ["diffusers", "-"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def teacher(folder: Path) -> Path:
    """A pipeline of random weights."""
    torch.manual_seed(0)
    save(TwoLayer(), FlowMatchEulerDiscreteScheduler(shift=3.0), folder)
    return folder
