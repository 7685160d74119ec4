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

CACHED_PROMPTS = 4096

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

    def _load(self, kind: Any, name: str, **dtype: torch.dtype) -> Any:
        module = kind.from_pretrained(self.folder, subfolder=name, use_safetensors=True, **dtype)
        return module.to(self.device).eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        """Loaded when first asked for: solving an ODE needs no VAE."""
        return self._load(AutoencoderKL, "vae", torch_dtype=self.dtype)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's states, (B, L, D); a prompt met before is not encoded again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._conditions]
        if len(self._conditions) + len(new) > CACHED_PROMPTS:
            self._conditions.clear()
            new = list(dict.fromkeys(prompts))
        for prompt in new:  # one at a time: what a prompt is encoded to must not depend on its batch
            self._conditions[prompt] = encode(self.tokenizer, self.text_encoder, [prompt])[0]
        return torch.stack([self._conditions[prompt] for prompt in prompts])

    def denoiser(self, prompts: Sequence[str], guidance_scale: float) -> Callable[[Tensor, int], Tensor]:
        """`denoise(z, t)`: the U-Net's output for these prompts, guided in one batched call unless the scale is 1."""
        conditional = self.encode_prompts(prompts)
        if guidance_scale == 1.0:
            return lambda z, t: self._network(z, t, conditional).sample
        condition = torch.cat([self.encode_prompts([""] * len(prompts)), conditional])

        def denoise(z: Tensor, t: int) -> Tensor:
            unconditional, guided = self._network(torch.cat([z, z]), t, condition).sample.chunk(2)
            return guide(unconditional, guided, guidance_scale)

        return denoise

    def to_device(self, array: NDArray[np.floating]) -> Tensor:
        return torch.from_numpy(array).to(self.device, self.dtype)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        return array.float().cpu().numpy()

    def inference(self) -> torch.inference_mode:
        return torch.inference_mode()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of scaled latents (B, C, h, w)."""
        factor = self.vae.config["scaling_factor"]
        parts = latents.to(self.device, self.dtype).split(batch_size)
        return torch.cat([self.vae.decode(z / factor).sample.float().cpu() for z in parts]).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Scaled latents of images in [-1, 1]: the posterior's mean."""
        factor = self.vae.config["scaling_factor"]
        parts = images.to(self.device, self.dtype).split(batch_size)
        return torch.cat([self.vae.encode(x).latent_dist.mode() * factor for x in parts])


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
