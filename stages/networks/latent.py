"""A teacher of Stable Diffusion's layout: a folder of stock diffusers components, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils import logging as transformers_logging

from stages.diffusion.guidance import guide
from stages.diffusion.prediction import Prediction
from stages.diffusion.schedule import NoiseSchedule
from stages.networks.compute import device_name

CACHED_PROMPTS = 4096
VAE_PIXELS = 4 * 512 * 512
"""Of Stable Diffusion: four images, whose widest activations in float32 take 1.1 GB a tensor."""

diffusers_logging.disable_progress_bar()  # a worker's output is a log
transformers_logging.disable_progress_bar()


class LatentTeacher:
    """U-Net, VAE and text encoder of one folder, frozen, in evaluation mode, on one device and of one dtype.

    Latents are always scaled: the VAE's times its `scaling_factor`.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.device_name = device_name(device)
        self.unet = self._load(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self.text_encoder = self._load(CLIPTextModel, "text_encoder", dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())
        self.prediction: Prediction = scheduler.config["prediction_type"]
        size = self.unet.config["sample_size"]
        self.latent_shape = (int(self.unet.config["in_channels"]), int(size), int(size))
        self._network = torch.compile(self.unet) if compile else self.unet
        self._conditions: dict[str, Tensor] = {}
        self._timesteps: dict[int, Tensor] = {}

    def _load(self, kind: Any, name: str, **dtype: torch.dtype) -> Any:
        module = kind.from_pretrained(self.folder, subfolder=name, use_safetensors=True, **dtype)
        return module.to(self.device).eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        """In float32, in which Stable Diffusion's does not overflow. Loaded when first asked for: solving an ODE
        needs no VAE."""
        return self._load(AutoencoderKL, "vae")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's states (B, L, D) in the teacher's dtype; a prompt met before is not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._conditions]
        if len(self._conditions) + len(new) > CACHED_PROMPTS:
            self._conditions.clear()
            new = list(dict.fromkeys(prompts))
        with torch.autocast(self.device.type, enabled=False):  # a cached state must not depend on who asked first
            for prompt in new:  # one at a time: nor on the batch it came in
                self._conditions[prompt] = encode(self.tokenizer, self.text_encoder, [prompt])[0]
        return torch.stack([self._conditions[prompt] for prompt in prompts])

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Tensor, int], Tensor]:
        """`denoise(z, t)`: the U-Net's output for these prompts, guided in one batched call unless the scale is 1.

        z and the output are float32: only the network computes in the teacher's dtype, so that a solver's
        state is not rounded at every step.
        """
        condition = self.encode_prompts(prompts)
        if guidance_scale == 1.0:
            return lambda z, t: self._call(z, t, condition)
        condition = torch.cat([self.encode_prompts([""] * len(prompts)), condition])

        def denoise(z: Tensor, t: int) -> Tensor:
            unconditional, conditional = self._call(torch.cat([z, z]), t, condition).chunk(2)
            return guide(unconditional, conditional, guidance_scale)

        return denoise

    def _call(self, z: Tensor, t: int, condition: Tensor) -> Tensor:
        if t not in self._timesteps:  # made once: a Python number would be copied to the GPU at every call
            self._timesteps[t] = torch.tensor(t, device=self.device)
        output: Tensor = self._network(z.to(self.dtype), self._timesteps[t], condition).sample
        return output.float()

    def to_device(self, array: NDArray[np.floating]) -> Tensor:
        """float32, whatever the network computes in: what is solved from is what is stored."""
        return torch.from_numpy(array).to(self.device, torch.float32)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        return array.float().cpu().numpy()

    def inference(self) -> torch.inference_mode:
        return torch.inference_mode()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], on the CPU, of scaled latents (B, C, h, w)."""
        factor = self.vae.config["scaling_factor"]
        side = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        parts = latents.to(self.device, torch.float32).split(_at_once(latents, side * side))
        return torch.cat([self.vae.decode(z / factor).sample.cpu() for z in parts]).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents of images (B, 3, H, W) in [-1, 1]: the posterior's mean."""
        factor = self.vae.config["scaling_factor"]
        parts = images.to(self.device, torch.float32).split(_at_once(images, 1))
        return torch.cat([self.vae.encode(x).latent_dist.mode() * factor for x in parts])


def _at_once(batch: Tensor, pixels_per_element: int) -> int:
    """How many samples a VAE is given at once: it needs far more memory than the U-Net, by the pixel."""
    pixels = batch.shape[-1] * batch.shape[-2] * pixels_per_element
    return min(64, max(1, VAE_PIXELS // pixels))


def encode(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> Tensor:
    """Texts to states (B, L, D), padded to the tokenizer's length, as StableDiffusionPipeline does it."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(next(text_encoder.parameters()).device))[0]
