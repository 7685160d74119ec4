"""A teacher of Stable Diffusion's layout: U-Net, VAE and text encoder of stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from stages.diffusion.form import Form
from stages.networks.network import NetworkTeacher

CACHED_PROMPTS = 4096
VAE_PIXELS = 4 * 512 * 512
"""Of Stable Diffusion: four images, whose widest activations in float32 take 1.1 GB a tensor."""
GUIDANCE_EMBEDDING = 256
"""Width of the zero-initialised guidance embedding, diffusers' own choice for distilled models."""


class LatentTeacher(NetworkTeacher):
    """Latents are always scaled: the VAE's times its `scaling_factor`. Prompts are texts."""

    UNET = UNet2DConditionModel

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        super().__init__(folder, device=device, dtype=dtype, compile=compile)
        self.text_encoder = self._load(CLIPTextModel, "text_encoder", dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self._conditions: dict[str, Tensor] = {}

    @cached_property
    def vae(self) -> Any:
        """In float32, in which Stable Diffusion's does not overflow. Loaded when first asked for: solving an ODE
        needs no VAE."""
        return self._load(AutoencoderKL, "vae", torch_dtype=torch.float32)

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

    @property
    def down_sampling(self) -> int:
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        factor = self.vae.config["scaling_factor"]
        parts = latents.to(self.device, torch.float32).split(_at_once(latents, self.down_sampling**2))
        return torch.cat([self.vae.decode(z / factor).sample.cpu() for z in parts]).clamp(-1, 1)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            images: Tensor = self.vae.decode(latents.float() / self.vae.config["scaling_factor"]).sample
            return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean."""
        factor = self.vae.config["scaling_factor"]
        parts = images.to(self.device, torch.float32).split(_at_once(images, 1))
        return torch.cat([self.vae.encode(x).latent_dist.mode() * factor for x in parts])

    def save_pipeline(self, unet: Any, scheduler: Any, folder: Path) -> None:
        """A U-Net that has no guidance embedding gets one of weight zero: diffusers then switches classifier-free
        guidance off at any scale, which would spoil a student that has its guidance built in."""
        embedded = unet.config["time_cond_proj_dim"] is not None
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet if embedded else self.with_guidance_embedding(unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)

    def with_guidance_embedding(self, unet: Any) -> UNet2DConditionModel:
        config = {**unet.config, "time_cond_proj_dim": GUIDANCE_EMBEDDING}
        embedded = UNet2DConditionModel.from_config(config).to(unet.device)
        missing, unexpected = embedded.load_state_dict(unet.state_dict(), strict=False)
        assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
        torch.nn.init.zeros_(embedded.time_embedding.cond_proj.weight)
        return embedded

    def usage(self, form: Form, scheduler: str) -> str:
        scale = f"guidance_scale={1 + sum(form.w_range) / 2:g}, " if form.w_range else ""
        remark = "" if form.w_range else "  # any guidance_scale gives the same"
        return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipeline("a prompt", {scale}num_inference_steps={form.steps}).images[0]{remark}"""


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
