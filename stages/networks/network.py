"""What all teachers that are networks share: a frozen U-Net of one folder, on one device, computing in one dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from stages.base import StageError
from stages.data.latents import LabelledLatents
from stages.diffusion.form import Form
from stages.diffusion.guidance import guide
from stages.diffusion.prediction import Prediction
from stages.diffusion.schedule import NoiseSchedule
from stages.networks.compute import device_name

diffusers_logging.disable_progress_bar()  # a worker's output is a log
transformers_logging.disable_progress_bar()


class NetworkTeacher(ABC):
    """A U-Net with its schedule, in evaluation mode. What it denoises is called a latent, whether it is one or an
    image: (C, H, W), latents scaled as the VAE's config says, images in [-1, 1]."""

    UNET: ClassVar[Any]
    """The class of diffusers that loads it. Its third argument is the condition."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.device_name = device_name(device)
        self.unet = self._load(self.UNET, "unet", torch_dtype=dtype)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())
        self.prediction: Prediction = scheduler.config["prediction_type"]
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (int(self.unet.config["in_channels"]), int(height), int(width))
        self._network = torch.compile(self.unet) if compile else self.unet
        self._timesteps: dict[int, Tensor] = {}

    def _load(self, kind: Any, name: str, **dtype: torch.dtype) -> Any:
        module = kind.from_pretrained(self.folder, subfolder=name, use_safetensors=True, **dtype)
        return module.to(self.device).eval().requires_grad_(False)

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """The U-Net's condition for each prompt, the first axis theirs; None for a network without any. Raises
        StageError for prompts that the teacher does not know."""

    def prompts_of(self, images: LabelledLatents) -> list[str]:
        """What it calls images of a set. Raises StageError where it has no word for them."""
        return images.captions

    @property
    @abstractmethod
    def down_sampling(self) -> int:
        """How many pixels wide an image is for one of its latent's."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], on the CPU, of latents (B, C, h, w)."""

    @abstractmethod
    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """The same of one batch at once, on its device, not clamped: for losses between images."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def save_pipeline(self, unet: Any, scheduler: Any, folder: Path) -> None:
        """Write this teacher's pipeline with another U-Net and scheduler in it, as stock as it can be."""

    @abstractmethod
    def with_guidance_embedding(self, unet: Any) -> Any:
        """The same network with one more input, the strength of guidance, that it does not heed yet. Raises StageError
        where diffusers has no such network."""

    @abstractmethod
    def usage(self, form: Form, scheduler: str) -> str:
        """The Python lines that draw an image with a pipeline saved by `save_pipeline`, its student of such a form;
        `scheduler` is the name of its scheduler's class."""

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Tensor, int], Tensor]:
        """`denoise(z, t)`: the U-Net's output for these prompts, guided in one batched call unless the scale is 1.

        z and the output are float32: only the network computes in the teacher's dtype, so that a solver's
        state is not rounded at every step.
        """
        condition = self.encode_prompts(prompts)
        if condition is None and guidance_scale != 1.0:
            raise StageError("the teacher is unconditional and cannot be guided: set sampler.guidance_scale: 1.0")
        if condition is None or guidance_scale == 1.0:
            return lambda z, t: self._call(z, t, condition)
        empty = self.encode_prompts([""] * len(prompts))
        assert empty is not None
        both = torch.cat([empty, condition])

        def denoise(z: Tensor, t: int) -> Tensor:
            unconditional, conditional = self._call(torch.cat([z, z]), t, both).chunk(2)
            return guide(unconditional, conditional, guidance_scale)

        return denoise

    def _call(self, z: Tensor, t: int, condition: Tensor | None) -> Tensor:
        if t not in self._timesteps:  # made once: a Python number would be copied to the GPU at every call
            self._timesteps[t] = torch.tensor(t, device=self.device)
        output: Tensor = self._network(z.to(self.dtype), self._timesteps[t], condition).sample
        return output.float()

    def retire(self) -> None:
        """Give the U-Net's place on the device back: for those who have copied it and ask it for nothing more."""
        self.unet.to("cpu")

    def to_device(self, array: NDArray[np.floating]) -> Tensor:
        """float32, whatever the network computes in: what is solved from is what is stored."""
        return torch.from_numpy(array).to(self.device, torch.float32)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        return array.float().cpu().numpy()

    def inference(self) -> torch.inference_mode:
        return torch.inference_mode()
