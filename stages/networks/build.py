"""New, small networks in the layout of Stable Diffusion 1.x, for teachers that are trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from stages.diffusion.prediction import Prediction

TEXT_WIDTH = 64
CLIP_LENGTH = 77


def word_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `captions`, as long as the longest of them, or as CLIP's if they
    are longer than that; the empty text is <start> <end>."""
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
    """Halves the image's side once for each entry of `channels` after the first."""
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
    """Stable Diffusion's schedule, on the trailing grid that ends at clean data."""
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
    return sum(p.numel() for p in module.parameters()) / 1e6
