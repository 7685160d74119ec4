"""What a Diffusion2GAN step needs at Stable Diffusion 1.5's size, by arithmetic: nothing is computed or allocated.

    python -m tests.benchmarks.gan_memory [--micro-batch 4] [--option "bf16, checkpointing"]

Every tensor of two whole steps of the training loop (both turns, R1 in each) is followed, as a fake one, from its
making to its end. Prints, in Markdown and in GB, what is held between steps (weights and EMA of the student, weights of
the discriminator, both players' two averages of AdamW, the perceptual network) and the most that is held at once. Left
out: text encoder (0.5 GB), the allocator's slack, and kernels' workspaces. Attention is counted as fused, but for R1.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.diffusion.schedule import NoiseSchedule
from stages.losses.augmentation import Augmentation
from stages.losses.config import Regression
from stages.losses.perceptual import PerceptualLoss
from stages.methods.base import Materials
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.networks.perceptual import LPIPS, About
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.vgg import VGG
from stages.training import TrainingExecution, TrainingSettings
from stages.training.loop import _Run

SIZE, CHANNELS, TOKENS, WIDTH = 64, 4, 77, 768
BF16, AGAIN = {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "float32, checkpointing": AGAIN,
    "bf16, checkpointing": {**BF16, **AGAIN},
    "bf16, checkpointing, no R1": {**BF16, **AGAIN, "r1_weight": 0},
    "bf16, checkpointing, no discriminator": {**BF16, **AGAIN, "gan_weight": 0},
}


class Held(TorchDispatchMode):
    """Bytes of all storages made under it and not freed yet, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Teacher(StableDiffusion):
    """Of Stable Diffusion 1.5's layout, as far as a method asks for it, and without a folder."""

    def __init__(self) -> None:
        self.network = UNet2DConditionModel(sample_size=SIZE, cross_attention_dim=WIDTH, attention_head_dim=8)
        self.schedule, self.device = NoiseSchedule.stable_diffusion(), torch.device("cpu")
        self.prediction, self._timesteps = "epsilon", {}

    def text_states(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), TOKENS, WIDTH)

    def release(self) -> None:
        del self.network  # its place on the device is given back


def copied(tensor: torch.Tensor, _memo: object) -> torch.Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def gigabytes(
    micro_batch: int,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    gan_weight: float = 0.1,
    r1_weight: float = 1.0,
) -> tuple[float, float]:
    """Held between steps, and at the worst moment of the second."""
    training = TrainingSettings(steps=2, batch_size=micro_batch, mixed_precision=mixed_precision)
    execution = TrainingExecution(device="cpu", gradient_checkpointing=gradient_checkpointing)
    discriminator = {"r1_every": 1, "r1_weight": r1_weight, "mix_and_match": 0}
    config = Diffusion2GANConfig(loss=Regression(name="mse"), gan_weight=gan_weight, discriminator=discriminator)
    with (
        FakeTensorMode(),
        patch.object(nn.Module, "to", lambda module, *_, **__: module),  # fakes can neither be moved
        patch.object(torch.Tensor, "__deepcopy__", copied),  # nor copied with their storage
        Held() as held,
    ):
        method = config.create(Materials(Teacher(), training))
        vgg = VGG(CHANNELS, 64, "latents")
        heads = [torch.ones(n) for n in vgg.tap_channels]
        metric = LPIPS(vgg, heads, About("latents", CHANNELS, 64, "random", std=1.0)).requires_grad_(False)
        metric._looked = True  # fakes have no standard deviation
        method.distance = PerceptualLoss(metric, Augmentation("bg"))
        run = _Run(method, execution)
        shape = (micro_batch, CHANNELS, SIZE, SIZE)
        pairs = {"noise": torch.randn(shape), "latent": torch.randn(shape), "prompts": [""] * micro_batch}
        for step in range(2):
            held.most = held.now
            for turn in method.turns(step):
                run.run_turn(turn, lambda _: {"pairs": pairs}, step, 0)
    return held.now / 1e9, held.most / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--option", choices=OPTIONS)
    given = parser.parse_args()
    print(f"micro-batch {given.micro_batch}\n\n| | between steps | at most |\n|---|---|---|")
    for name, option in OPTIONS.items():
        if given.option in (None, name):
            between, most = gigabytes(given.micro_batch, **option)
            print(f"| {name} | {between:.1f} | {most:.1f} |", flush=True)


if __name__ == "__main__":
    main()
