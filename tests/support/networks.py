"""Teachers and students with random weights, and how plain diffusers samples from an exported student."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stages.networks import build
from stages.networks.adapter import Adapter
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""The scheduler's JSON of Stable Diffusion 1.5. It names no prediction type and no spacing of timesteps."""


def stable_diffusion_layout(folder: Path, unet: UNet2DConditionModel | None = None) -> Path:
    """Write a text-to-image pipeline with random weights, laid out as Stable Diffusion 1.5 is published. Latents have
    the shape (4, 8, 8), encoded prompts (77, 32)."""
    tokenizer = letters("<|endoftext|>")
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=build.autoencoder(16, (8, 16)),
        text_encoder=build.text_encoder(tokenizer, width=32, layers=1),
        tokenizer=tokenizer,
        unet=unet or build.unet(8, 32, (16, 32)),
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The config of the U-Net of stable-diffusion-xl-base-1.0."""
XL_TEXT = {
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 77,
    "vocab_size": 6,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "pad_token_id": 5,
}


def stable_diffusion_xl_layout(folder: Path, prediction: str = "epsilon", zeros: bool = True, **unet: Any) -> Path:
    """Write an SDXL pipeline with random weights. Its configs are those of stable-diffusion-xl-base-1.0, narrowed.

    Latents have the shape (4, 8, 8), images (3, 16, 16). The text states have 32 + 48 features, the pooled text 24.
    """
    torch.manual_seed(0)
    first = CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, hidden_act="quick_gelu", **XL_TEXT)
    second = CLIPTextConfig(hidden_size=48, intermediate_size=96, projection_dim=24, hidden_act="gelu", **XL_TEXT)
    network = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 80,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "norm_num_groups": 8,
            **unet,
        }
    )
    vae = build.autoencoder(16, (8, 16))
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=letters("<|endoftext|>"),
        tokenizer_2=letters("a"),
        unet=network,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction,
        ),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def letters(padding: str) -> CLIPTokenizer:
    letters = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=padding)


def adapter_around(network: Any, family: type[Adapter] = StableDiffusion) -> Any:
    """Return an adapter of `family` around a network of the test, on the CPU. It has no folder and no components from
    one: it can only call the network and read its features."""
    adapter = family.__new__(family)
    adapter.network, adapter.device, adapter._timesteps = network, torch.device("cpu"), {}
    return adapter


def pixel_unet(classes: int | None = None) -> UNet2DModel:
    """A U-Net of images (3, 8, 8) with random weights, unconditional or with so many classes."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=classes,
    )


def photographs(path: Path, size: int = 16) -> Path:
    """Write a tar of twelve noisy images with captions and classes, in webdataset format."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(12):
            png = BytesIO()
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("txt", b"a b"), ("cls", b"%d" % (i % 2))):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    return path


def shaken(student: Student) -> Student:
    """Add noise to all weights of the student, and freeze it. A new student has layers of zeros and the teacher's
    weights, so a wrong computation could give the right result."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return student.eval().requires_grad_(False)


def drawn(folder: Path, noise: torch.Tensor, prompts: list[str], **settings: Any) -> torch.Tensor:
    """Latents that plain diffusers samples from this noise (N, 4, H, W) with the pipeline in `folder`."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompts, latents=noise, output_type="latent", **settings).images
