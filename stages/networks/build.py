"""Small networks with random weights in the layout of Stable Diffusion 1.x, for teachers that Retort trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from stages.diffusion.prediction import Prediction

TEXT_WIDTH = 64
"""The default width of the text encoder's states."""
CLIP_LENGTH = 77
"""The maximum number of tokens of CLIP's tokenizer."""


def word_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Create a word-level tokenizer with the lower-case words and punctuation marks of `captions`.

    Its maximum length is that of the longest caption, at most CLIP_LENGTH tokens. The empty text is <start> <end>."""
    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()  # punctuation marks are words
    split = [
        [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))] for caption in set(captions)
    ]
    words = sorted({word for caption in split for word in caption})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<unknown>", *words, "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=min(CLIP_LENGTH, 2 + max(map(len, split))),
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    )


def text_encoder(tokenizer: PreTrainedTokenizerFast, width: int = TEXT_WIDTH, layers: int = 2) -> CLIPTextModel:
    """Create a CLIP text encoder for `tokenizer`, with states (B, L, `width`)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def autoencoder(size: int, channels: Sequence[int] = (32, 64), latent_channels: int = 4) -> AutoencoderKL:
    """Create a VAE for images of `size` pixels.

    It halves height and width once for each entry of `channels` after the first."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
    )


def unet(latent_size: int, cross_attention_dim: int, channels: Sequence[int] = (32, 64)) -> UNet2DConditionModel:
    """Create a U-Net for latents of 4 channels, with cross-attention at the coarsest scale only."""
    down = ["DownBlock2D"] * (len(channels) - 1) + ["CrossAttnDownBlock2D"]
    up = ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=latent_size,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def ddim_scheduler(prediction: Prediction, **extra: Any) -> DDIMScheduler:
    """Create a DDIMScheduler with Stable Diffusion's schedule and trailing timesteps. The last step is to clean data.

    `extra` is passed to its constructor."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=prediction,
        **extra,
    )


def parameters_millions(module: torch.nn.Module) -> float:
    """Return the number of parameters, in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6
