"""A teacher in pixel space: diffusers' UNet2DModel, unconditional (a stock DDPM or DDIM pipeline) or by class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor

from stages.base import StageError
from stages.data.latents import LabelledLatents
from stages.diffusion.form import Form
from stages.networks.network import NetworkTeacher

LABELS = "id2label"
"""Key of `model_index.json` for the names of classes, as diffusers' DiTPipeline keeps them; optional."""


class PixelTeacher(NetworkTeacher):
    """Prompts are classes, by number ("7") or by the name that the folder gives to one of them alone; of an
    unconditional teacher all are empty. A class more than there are names is the one for no class, which guidance
    needs."""

    UNET = UNet2DModel

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        super().__init__(folder, device=device, dtype=dtype, compile=compile)
        self.index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        classes = self.unet.config["num_class_embeds"]
        labels = {int(number): str(name) for number, name in self.index.get(LABELS, {}).items()}
        unique = {name: number for number, name in labels.items() if list(labels.values()).count(name) == 1}
        self._classes = None if classes is None else {**unique, **{str(i): i for i in range(classes)}}
        if self._classes is not None and len(labels) == classes - 1:
            self._classes[""] = next(i for i in range(classes) if i not in labels)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Classes (B,); None for an unconditional teacher."""
        if self._classes is None:
            given = next((prompt for prompt in prompts if prompt), None)
            if given is not None:
                raise StageError(f"the teacher is unconditional, but was given {given!r}: leave prompts out")
            return None
        unknown = next((prompt for prompt in prompts if prompt not in self._classes), None)
        if unknown == "":
            raise StageError(
                "the teacher has no class that stands for none: prompts are needed, and guidance_scale: 1.0"
            )
        if unknown is not None:
            known = ", ".join(filter(None, list(self._classes)[:20]))
            raise StageError(f"{unknown!r} is no class of the teacher; it has {known}")
        return torch.tensor([self._classes[prompt] for prompt in prompts], device=self.device)

    def prompts_of(self, images: LabelledLatents) -> list[str]:
        if self._classes is None:
            return [""] * len(images)
        if len(images.labels) != 1:
            found = ", ".join(images.labels) or "none"
            raise StageError(f"the teacher knows images by their class, of which the image set has {found}; give one")
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
        images = images.to(self.device, torch.float32)
        return images.mean(1, keepdim=True) if self.latent_shape[0] == 1 else images

    def save_pipeline(self, unet: Any, scheduler: Any, folder: Path) -> None:
        kind = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline  # which keeps any other scheduler
        kind(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
        if LABELS in self.index:
            path = folder / "model_index.json"
            index = {**json.loads(path.read_text(encoding="utf-8")), LABELS: self.index[LABELS]}
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def with_guidance_embedding(self, unet: Any) -> Any:
        raise StageError("diffusers' UNet2DModel takes no strength of guidance as an input; give a latent teacher")

    def usage(self, form: Form, scheduler: str) -> str:
        if self._classes is None:
            return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipeline(num_inference_steps={form.steps}).images[0]"""
        return f"""import torch
from diffusers import {scheduler}, UNet2DModel

# diffusers has no pipeline that passes a class to this network
unet = UNet2DModel.from_pretrained("THIS FOLDER", subfolder="unet")
scheduler = {scheduler}.from_pretrained("THIS FOLDER", subfolder="scheduler")
scheduler.set_timesteps({form.steps})
z = noise = torch.randn(1, {", ".join(map(str, self.latent_shape))})
with torch.no_grad():
    for t in scheduler.timesteps:
        output = unet(z, t, class_labels=torch.tensor([0])).sample
        z = scheduler.step(output, t, z).prev_sample
image = z  # in [-1, 1]"""
