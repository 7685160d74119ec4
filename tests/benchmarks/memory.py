"""Computes the memory that a training step needs at the size of a published teacher. Nothing is trained or allocated.

    python -m tests.benchmarks.memory [--teacher sdxl] [--micro-batch 1] [--rank 64] [--method diffusion2gan]

Runs whole steps of the training loop with fake tensors, and counts the bytes of each tensor from its creation to its
end. Prints, in Markdown and in GB: the memory held between steps (weights, their EMA, both averages of AdamW, the
perceptual network of Diffusion2GAN), the peak during a step, and in brackets the smallest GPU of GPUS with enough
memory. The GPU must also hold the text encoders and the VAE, and 5 % more for the allocator's slack and the kernels'
workspaces. Also prints the size of pairs on disk.

In each step of DMD and DMD2, the student and the fake score have a turn. Both train all weights, or both a LoRA. The
teacher is guided. DMD has as many pairs as new samples, and their distance is mse. DMD2 has its GAN head.

SDS and VSD optimise an image of the teacher's size, which its VAE encodes with gradients. VSD's score trains all
weights, or a LoRA. The VAE counts as held memory.

With `--measure`, the same steps also run on the GPU of this machine, if they fit. Each figure is followed by the peak
of PyTorch's allocator there.

Two things are counted as on a GPU: AdamW updates all weights at once, and autocast computes norms in float32. Attention
is counted as fused, except for R1, whose second derivative needs the attention matrices.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.data.records import Pair
from stages.data.shards import write_shard
from stages.diffusion.schedule import NoiseSchedule
from stages.losses.augmentation import Augmentation
from stages.losses.config import Regression
from stages.losses.perceptual import PerceptualLoss
from stages.methods.base import Materials, StudentTraining
from stages.methods.diffusion2gan.config import Diffusion2GANConfig
from stages.methods.dmd.config import DMDConfig
from stages.methods.dmd2.config import DMD2Config
from stages.methods.knowledge_distillation.config import KnowledgeDistillationConfig
from stages.methods.matching import FakeScoreSettings
from stages.networks.condition import Condition
from stages.networks.lora import LoraSettings
from stages.networks.perceptual import LPIPS, About
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.vgg import VGG
from stages.optimize.config import ObjectiveMaterials, ObjectTraining
from stages.optimize.objectives import OBJECTIVES
from stages.optimize.objectives.config import ParticleScore
from stages.optimize.representations.flat import Images
from stages.training import TrainingExecution
from stages.training.loop import _Run
from tests.support.networks import SDXL_UNET

CHANNELS = 4
SLACK = 1.05
GPUS = (24, 40, 80, 141)
"""Sizes of GPUs in GB."""
PAIRS = (1, 3, 12)
"""Millions of pairs."""
WITHOUT, WITH = 2, 16
"""The numbers of a step without R1 and of a step with R1, which is computed every 16 steps."""


@dataclass(frozen=True)
class Published:
    """A teacher's layout, as its configs give it."""

    side: int
    """Of its latents."""
    condition: Mapping[str, tuple[int, ...]]
    """The shape of each tensor of the condition, without the batch dimension."""
    beside: float
    """GB of its text encoders and its VAE, in float32."""
    unet: Mapping[str, Any]

    def network(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(**{**self.unet, "sample_size": self.side})


TEACHERS = {
    "sd15": Published(64, {"text": (77, 768)}, 0.8, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sdxl": Published(
        128,
        {"text": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        3.6,
        SDXL_UNET,
    ),
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The config of the VAE of both."""
OPTIONS = {
    "float32": ("no", False),
    "float32, checkpointing": ("no", True),
    "bf16": ("bf16", False),
    "bf16, checkpointing": ("bf16", True),
}
"""Precision, and whether activations are recomputed."""
METHODS = {
    "knowledge_distillation": (WITHOUT,),
    "diffusion2gan": (WITHOUT, WITH),
    "dmd": (WITHOUT,),
    "dmd2": (WITHOUT,),
    "sds": (WITHOUT,),
    "vsd": (WITHOUT,),
}
"""Method -> the steps that are measured."""


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside this mode and are not freed yet (`now`), and their maximum
    (`most`)."""

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


class Allocated:
    """The bytes that PyTorch's allocator holds on the GPU (`now`), and their maximum since `most` was set."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated()

    @most.setter
    def most(self, _now: int) -> None:
        torch.cuda.reset_peak_memory_stats()


class Teacher(StableDiffusion):
    """A teacher of a published layout, without a folder. It has only what the methods use."""

    def __init__(self, published: Published, encodes: bool = False) -> None:
        self.published, self.network = published, published.network().requires_grad_(False)
        self._called, self.latent_shape = self.network, (CHANNELS, published.side, published.side)
        self.schedule, self.device = NoiseSchedule.stable_diffusion(), torch.get_default_device()
        self.prediction, self._timesteps, self.dtype = "epsilon", {}, torch.float32
        self.vae = AutoencoderKL(**VAE).requires_grad_(False) if encodes else None

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        rows, shapes = len(prompts), self.published.condition
        return Condition(rows, {name: torch.zeros(rows, *shape) for name, shape in shapes.items()})

    def release(self) -> None:
        del self.network, self._called  # its memory is freed, except for weights that LoRA networks share


@contextmanager
def fakes() -> Iterator[Held]:
    """A context in which tensors have no data, and norms compute in float32, as under autocast on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for owner, name, changed in (
            (nn.Module, "to", lambda module, *_, **__: module),  # fakes can neither be moved
            (torch.Tensor, "__deepcopy__", _copied),  # nor copied with their storage
            (functional, "group_norm", _in_float32(functional.group_norm)),
            (functional, "layer_norm", _in_float32(functional.layer_norm)),
        ):
            stack.enter_context(patch.object(owner, name, changed))
        yield stack.enter_context(Held())


@contextmanager
def on_gpu() -> Iterator[Allocated]:
    """A context in which tensors are made on the GPU."""
    _free()
    with torch.device("cuda"):
        yield Allocated()


def _free() -> None:
    """Free the GPU memory of tensors that nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def _copied(tensor: torch.Tensor, _memo: object) -> torch.Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _in_float32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *rest, **named: norm(x.float(), *rest, **named)


def gigabytes(
    published: Published, name: str, training: StudentTraining, gradient_checkpointing: bool, measure: bool = False
) -> tuple[float, dict[int, float]]:
    """Return the memory held between steps, and the maximum in each of the method's steps. `measure`: measure it on the
    GPU."""
    execution = TrainingExecution(device="cuda" if measure else "cpu", gradient_checkpointing=gradient_checkpointing)
    with on_gpu() if measure else fakes() as held:
        method = _method(published, name, training)
        run = _Run(method, execution)
        for optimizer in run.optimizers.values():
            optimizer.param_groups[0]["foreach"] = True  # the default on a GPU
        shape = (training.batch_size, CHANNELS, published.side, published.side)
        pairs = {"noise": torch.randn(shape), "latent": torch.randn(shape), "prompts": [""] * training.batch_size}
        batch = {"pairs": pairs, "latents": pairs, "particles": Firsts(training.batch_size)}
        most = {}
        for step in (WITHOUT - 1, *METHODS[name]):  # the first makes the averages of AdamW
            held.most = held.now
            for turn in method.turns(step):
                run.run_turn(turn, lambda _: batch, step, 0)
            most[step] = held.most / 1e9
        return held.now / 1e9, most


class Firsts:
    """The particle number of each view, always 0. It replaces a fake tensor, which has no values."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def tolist(self) -> list[int]:
        return [0] * self.count


def _method(published: Published, name: str, training: StudentTraining) -> Any:
    if name in OBJECTIVES:
        teacher = Teacher(published, encodes=True)
        settings = {"score": ParticleScore(lora=training.lora)} if name == "vsd" else {}
        own = ObjectTraining(
            steps=training.steps, batch_size=training.batch_size, mixed_precision=training.mixed_precision
        )
        particles = Images(teacher, 1)
        return OBJECTIVES[name](**settings).create(ObjectiveMaterials(teacher, particles, "", own))
    materials, plain = Materials(Teacher(published), training), Regression(name="l1")
    if name == "knowledge_distillation":
        return KnowledgeDistillationConfig(loss=plain, prediction="epsilon").create(materials)
    matching: dict[str, Any] = {"fake_score": FakeScoreSettings(lora=training.lora), "guidance_scale": 2.0}
    if name == "dmd":
        return DMDConfig(loss=Regression(name="mse"), **matching).create(materials)
    if name == "dmd2":
        return DMD2Config(fake_updates=1, **matching).create(materials)
    method: Any = Diffusion2GANConfig(loss=plain, prediction="epsilon").create(materials)
    vgg = VGG(CHANNELS, 64, "latents")
    heads = [torch.ones(n) for n in vgg.tap_channels]
    metric = LPIPS(vgg, heads, About("latents", CHANNELS, 64, "random", std=1.0)).requires_grad_(False)
    metric._looked = True  # fakes have no standard deviation
    method.distance = PerceptualLoss(metric, Augmentation("bg"))
    return method


def sizes(published: Published, rank: int) -> str:
    """Return the number of parameters of a network, and that of LoRA weights for the default targets, as text."""
    with fakes() as held:
        teacher = Teacher(published)
        whole, size = sum(weight.numel() for weight in teacher.network.parameters()), held.now
        lora = [weight for weight in teacher.lora_network(LoraSettings(rank=rank)).parameters() if weight.requires_grad]
        trained = sum(weight.numel() for weight in lora)
        assert (size, held.now) == (4 * whole, 4 * (whole + trained)), (size, held.now)
    return f"U-Net: {whole / 1e6:.1f} M parameters; LoRA of rank {rank}: {trained / 1e6:.1f} M"


def pair_bytes(side: int, count: int = 16) -> float:
    """Return the bytes on disk of one pair in float16: the size of a shard and its receipt, divided by its pairs."""
    arrays = {name: np.random.default_rng(0).normal(size=(CHANNELS, side, side)) for name in ("noise", "latent")}
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    with TemporaryDirectory() as folder:
        write_shard(Path(folder) / "0.tar", [Pair(i, "a prompt", halves) for i in range(count)], {}, {})
        return sum(file.stat().st_size for file in Path(folder).iterdir()) / count


def smallest_gpu(most: float, beside: float) -> str:
    return next((str(size) for size in GPUS if SLACK * (most + beside) <= size), "none")


def rows(
    published: Published, name: str, micro_batch: int, lora: LoraSettings | None, measure: bool
) -> Iterator[Sequence[str]]:
    """Return the rows of the table for one method: without R1, and with R1 if the method has it."""
    settings = StudentTraining(steps=2 * WITH, batch_size=micro_batch, lora=lora)
    found, seen = [], []
    for precision, checkpointing in OPTIONS.values():
        own = settings.model_copy(update={"mixed_precision": precision})
        found.append(gigabytes(published, name, own, checkpointing))
        if measure:
            _free()
        fits = measure and max(found[-1][1].values()) < torch.cuda.mem_get_info()[0] / 1e9 - 2
        seen.append(gigabytes(published, name, own, checkpointing, measure=True)[1] if fits else {})
    for step in METHODS[name]:
        cells = [
            f"{most[step]:.1f} ({smallest_gpu(most[step], published.beside)})"
            + (f" measured {measured[step]:.1f}" if measured else "")
            for (_, most), measured in zip(found, seen, strict=True)
        ]
        yield f"{name}, R1" if step == WITH else name, "LoRA" if lora else "all", f"{found[0][0]:.1f}", *cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=TEACHERS, default="sdxl")
    parser.add_argument("--method", choices=METHODS, help="only this one")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--measure", action="store_true", help="also run the steps on the GPU")
    given = parser.parse_args()
    published = TEACHERS[given.teacher]
    each = pair_bytes(published.side)
    on_disk = ", ".join(f"{count} M pairs {each * count / 1e6:.2f} TB" for count in PAIRS)
    print(f"{given.teacher}, micro-batch {given.micro_batch}. {sizes(published, given.rank)}.")
    print(f"A pair in float16: {each:,.0f} bytes; {on_disk}.\n")
    print("| method | trained | between steps |", " | ".join(OPTIONS), "|\n|---|---|---|" + "---|" * len(OPTIONS))
    for name, lora in product([given.method] if given.method else METHODS, (None, LoraSettings(rank=given.rank))):
        for row in rows(published, name, given.micro_batch, lora, given.measure):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
