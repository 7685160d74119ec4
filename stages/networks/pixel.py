"""The adapter of pixel-space pipelines: diffusers' UNet2DModel, unconditional or conditioned on classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.base import StageError
from stages.diffusion.form import Form
from stages.networks.adapter import INDEX, Adapter, read_json
from stages.networks.lora import UNET_TARGETS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.data.latents import LabelledLatents
    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition
    from stages.networks.unet_features import Bottleneck, Features

LABELS = "id2label"
"""The optional key of `model_index.json` that maps class numbers to names, as in diffusers' DiTPipeline."""
CLASS = "class"
"""The name of the condition's tensor: class numbers (B,)."""


class PixelDiffusion(Adapter):
    """A pixel-space pipeline: DDPMPipeline or DDIMPipeline. Latents are images in [-1, 1].

    A prompt is the number of a class, such as "7", or its name in `id2label`. Names that several classes share cannot
    be prompts. If `id2label` names all classes but one, that one is the null class. It is the condition of the empty
    prompt, and guidance needs it. The prompts of an unconditional teacher are empty."""

    COMPONENTS: ClassVar[Mapping[str, str | None]] = {"unet": "UNet2DModel", "scheduler": None}
    FILES = (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    )
    SUPPORTS = "pixel-space ones (DDPMPipeline or DDIMPipeline: UNet2DModel, with classes or without)"
    FURTHER_INPUTS = ("class_embed_type",)
    FEATURES = True
    LORA_TARGETS = UNET_TARGETS

    @classmethod
    def classes_of(cls, folder: Path) -> int | None:
        """Return the number of classes, with the null class, or None if the network is unconditional.

        Raises Unsupported if the config is missing."""
        found: int | None = read_json(folder / "unet" / "config.json").get("num_class_embeds")
        return found

    @classmethod
    def guidance_error(cls, folder: Path, as_input: bool) -> str | None:
        known, names = cls.classes_of(folder), read_json(folder / INDEX).get(LABELS, {})
        if known is None:
            return "the teacher is unconditional"
        if len(names) != known - 1:
            return "the teacher has no null class"
        return "diffusers' UNet2DModel cannot take the guidance strength as an input" if as_input else None

    @classmethod
    def network_class(cls) -> Any:
        from diffusers import UNet2DModel

        return UNet2DModel

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        super().__init__(folder, device=device, dtype=dtype, compile=compile)
        self.index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        classes = self.network.config["num_class_embeds"]
        labels = {int(number): str(name) for number, name in self.index.get(LABELS, {}).items()}
        unique = {name: number for number, name in labels.items() if list(labels.values()).count(name) == 1}
        self._classes = None if classes is None else {**unique, **{str(i): i for i in range(classes)}}
        if self._classes is not None and len(labels) == classes - 1:
            self._classes[""] = next(i for i in range(classes) if i not in labels)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        import torch

        from stages.networks.condition import Condition

        if self._classes is None:
            given = next((prompt for prompt in prompts if prompt), None)
            if given is not None:
                raise StageError(f"the teacher is unconditional, but was given {given!r}: leave prompts out")
            return Condition(len(prompts))
        unknown = next((prompt for prompt in prompts if prompt not in self._classes), None)
        if unknown == "":
            raise StageError("the teacher has no null class: give prompts, and set guidance_scale: 1.0")
        if unknown is not None:
            known = ", ".join(filter(None, list(self._classes)[:20]))
            raise StageError(f"{unknown!r} is not a class of the teacher, which has {known}")
        numbers = torch.tensor([self._classes[prompt] for prompt in prompts], device=self.device)
        return Condition(len(prompts), {CLASS: numbers})

    def encode_dropped(self) -> Condition:
        if self._classes is None:
            raise StageError("the teacher is unconditional and cannot be guided: set sampler.guidance_scale: 1.0")
        return super().encode_dropped()

    @classmethod
    def predict(cls, network: Any, z: Tensor, level: Level, condition: Condition, w: Tensor | None = None) -> Tensor:
        from stages.networks.camera import CAMERA, labels

        seen = labels(*map(condition.to(z).tensors.get, (CLASS, CAMERA)))
        output: Tensor = network(z, level.timestep, seen).sample
        return output

    def prompts_of(self, images: LabelledLatents) -> list[str]:
        if self._classes is None:
            return [""] * len(images)
        if len(images.labels) != 1:
            found = ", ".join(images.labels) or "none"
            raise StageError(
                f"the teacher needs an image set with exactly one label for each image; this one has {found}"
            )
        return [str(number) for number in next(iter(images.labels.values()))]

    @property
    def down_sampling(self) -> int:
        return 1

    def decode(self, latents: Tensor) -> Tensor:
        images = latents.float().cpu().clamp(-1, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1) if latents.shape[1] == 1 else latents

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_with_gradient(images.to(self.device).float())

    def encode_with_gradient(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True) if self.latent_shape[0] == 1 else images

    def save_pipeline(self, network: Any, scheduler: Any, folder: Path) -> None:
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

        # DDPMPipeline keeps any scheduler. DDIMPipeline converts it to a DDIMScheduler.
        kind = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
        kind(unet=network, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
        if LABELS in self.index:
            path = folder / INDEX
            index = {**json.loads(path.read_text(encoding="utf-8")), LABELS: self.index[LABELS]}
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def with_camera(self, network: Any) -> Any:
        from stages.networks.camera import add_camera

        return add_camera(network)

    def features(self, network: Any, multi_scale: bool) -> Features:
        from stages.networks.unet_features import Features

        return Features(network, multi_scale)

    def bottleneck(self, network: Any) -> Bottleneck:
        from stages.networks.unet_features import Bottleneck

        return Bottleneck(network)

    def usage(self, form: Form, scheduler: str, lora: bool = False) -> str:
        steps = f"timesteps={list(form.levels)}" if form.levels else str(form.steps)
        if self._classes is None and not form.levels:
            return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipeline(num_inference_steps={form.steps}).images[0]"""
        missing, label = ("timesteps", "") if self._classes is None else ("a class", ", class_labels=torch.tensor([0])")
        return f"""import torch
from diffusers import {scheduler}, UNet2DModel

# diffusers has no pipeline that passes {missing} to this network
unet = UNet2DModel.from_pretrained("THIS FOLDER", subfolder="unet")
scheduler = {scheduler}.from_pretrained("THIS FOLDER", subfolder="scheduler")
scheduler.set_timesteps({steps})
z = noise = torch.randn(1, {", ".join(map(str, self.latent_shape))})
with torch.no_grad():
    for t in scheduler.timesteps:
        output = unet(z, t{label}).sample
        z = scheduler.step(output, t, z).prev_sample
image = z  # in [-1, 1]"""
