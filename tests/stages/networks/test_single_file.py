"""Stable Diffusion's original layout: stock diffusers reads it back to the bit. Its names are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stages.base import StageError
from stages.networks import single_file
from tests.support.networks import SDXL_UNET

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""The config of Stable Diffusion's VAE, which SDXL has too."""
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
"""The config of Stable Diffusion 1.5's U-Net. The rest are defaults of diffusers."""
SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SMALL_VAE = {**VAE, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 8, "sample_size": 64}
SMALL = {"sample_size": 8, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "attention_head_dim": 4}
SMALL_XL = {
    **(SDXL_UNET | SMALL),
    "block_out_channels": (16, 32, 32),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 32 + 48,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 40,
}


def tokenizer() -> CLIPTokenizer:
    letters = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(letters)}, merges=[], model_max_length=77)


def text_config(width: int, act: str, layers: int = 3, **further: int) -> CLIPTextConfig:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    tokens = {"vocab_size": 6, "bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 5}
    return CLIPTextConfig(hidden_act=act, num_attention_heads=4, **sizes, **tokens, **further)


def common(unet: dict[str, Any]) -> dict[str, Any]:
    return {
        "vae": AutoencoderKL(**SMALL_VAE),
        "unet": UNet2DConditionModel(**unet),
        "tokenizer": tokenizer(),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    }


def stable_diffusion(unet: dict[str, Any], act: str) -> StableDiffusionPipeline:
    text = CLIPTextModel(text_config(32, act))
    return StableDiffusionPipeline(
        **common({**unet, **SMALL, "cross_attention_dim": 32}),
        text_encoder=text,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """The two text encoders have different widths, by which diffusers tells them apart."""
    return StableDiffusionXLPipeline(
        **common(SMALL_XL),
        text_encoder=CLIPTextModel(text_config(32, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(48, "gelu", projection_dim=40)),
        tokenizer_2=tokenizer(),
    )


PIPELINES = {
    "1.x": lambda: stable_diffusion(SD1, "quick_gelu"),
    "2.x": lambda: stable_diffusion(SD2, "gelu"),
    "xl": stable_diffusion_xl,
}


def modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def shaken(pipeline: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for module in modules(pipeline).values():
            for value in module.parameters():
                value.add_(0.05 * torch.randn_like(value))
    return pipeline


def converted(pipeline: Any, **options: Any) -> dict[str, torch.Tensor]:
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    convert = single_file.stable_diffusion_xl if xl else single_file.stable_diffusion
    return convert(**modules(pipeline), **({"predicts_v": False, **options} if xl else options))


def image(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline("a b", latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images


@pytest.mark.parametrize("layout", PIPELINES)
def test_diffusers_reads_every_weight_exactly_and_draws_the_same_image(tmp_path, layout):
    pipeline = shaken(PIPELINES[layout]())
    pipeline.save_pretrained(tmp_path / "pipeline")
    weights = {name: value.contiguous() for name, value in converted(pipeline).items()}
    save_file(weights, tmp_path / "one.safetensors")
    read = type(pipeline).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "pipeline"), local_files_only=True
    )
    assert modules(read).keys() == modules(pipeline).keys()
    for name, module in modules(pipeline).items():
        ours, theirs = module.state_dict(), modules(read)[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    assert torch.equal(image(pipeline), image(read))


WELL_KNOWN = {
    "1.x": """
        model.diffusion_model.input_blocks.0.0.weight
        model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight
        model.diffusion_model.input_blocks.3.0.op.weight
        model.diffusion_model.input_blocks.4.0.skip_connection.weight
        model.diffusion_model.input_blocks.11.0.in_layers.2.weight
        model.diffusion_model.middle_block.1.proj_in.weight
        model.diffusion_model.middle_block.2.out_layers.3.bias
        model.diffusion_model.output_blocks.2.1.conv.weight
        model.diffusion_model.output_blocks.5.2.conv.weight
        model.diffusion_model.output_blocks.11.0.skip_connection.weight
        model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias
        model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight
        model.diffusion_model.time_embed.2.bias
        model.diffusion_model.out.2.weight
        first_stage_model.decoder.up.3.block.0.norm1.weight
        first_stage_model.decoder.up.0.block.0.nin_shortcut.weight
        first_stage_model.decoder.up.1.upsample.conv.weight
        first_stage_model.decoder.mid.block_2.conv1.weight
        first_stage_model.encoder.down.2.downsample.conv.bias
        first_stage_model.encoder.mid.attn_1.q.weight
        first_stage_model.encoder.norm_out.weight
        first_stage_model.post_quant_conv.weight
        cond_stage_model.transformer.text_model.embeddings.position_embedding.weight
        cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight
    """,
    "2.x": """
        model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight
        cond_stage_model.model.positional_embedding
        cond_stage_model.model.token_embedding.weight
        cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight
        cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.bias
        cond_stage_model.model.transformer.resblocks.0.ln_2.weight
        cond_stage_model.model.ln_final.weight
    """,
    "xl": """
        model.diffusion_model.label_emb.0.0.weight
        model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight
        model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight
        model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.weight
        model.diffusion_model.output_blocks.2.2.conv.weight
        model.diffusion_model.output_blocks.8.0.skip_connection.bias
        conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight
        conditioner.embedders.1.model.positional_embedding
        conditioner.embedders.1.model.text_projection
        conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias
        conditioner.embedders.1.model.transformer.resblocks.31.attn.out_proj.weight
    """,
}
"""Names that published checkpoints have, and that programs look for."""


def full_size(layout: str) -> dict[str, torch.Tensor]:
    """The published networks, without memory for their weights."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**{"1.x": SD1, "2.x": SD2, "xl": SDXL_UNET}[layout]), AutoencoderKL(**VAE)
        if layout == "2.x":
            return single_file.stable_diffusion(unet, vae, CLIPTextModel(text_config(1024, "gelu", 23)))
        clip = CLIPTextModel(text_config(768, "quick_gelu", 12))
        if layout == "1.x":
            return single_file.stable_diffusion(unet, vae, clip)
        second = CLIPTextModelWithProjection(text_config(1280, "gelu", 32, projection_dim=1280))
        return single_file.stable_diffusion_xl(unet, vae, clip, second, predicts_v=True)


@pytest.mark.parametrize(
    ("layout", "unet", "text"), [("1.x", 686, 196), ("2.x", 686, 4 + 12 * 23), ("xl", 1680, 196 + 5 + 12 * 32)]
)
def test_full_size_networks_have_the_published_names(layout, unet, text):
    weights = full_size(layout)
    counts = {prefix: sum(name.startswith(prefix) for name in weights) for prefix in ("model.", "first_", "cond")}
    assert counts == {"model.": unet, "first_": 248, "cond": text}
    assert not [name for name in WELL_KNOWN[layout].split() if name not in weights]
    assert weights["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    linear = layout != "1.x"
    assert weights["model.diffusion_model.middle_block.1.proj_in.weight"].ndim == (2 if linear else 4)
    if layout == "xl":
        assert weights["v_pred"].numel() == 0
        projection = weights["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
        assert projection.shape == (3 * 1280, 1280)


def test_only_networks_that_predict_v_have_the_key_of_v_prediction():
    assert "v_pred" not in converted(stable_diffusion_xl())


def test_an_empty_guidance_embedding_is_left_out():
    pipeline = stable_diffusion(SD1, "quick_gelu")
    plain = converted(pipeline)
    pipeline.unet = UNet2DConditionModel(**{**pipeline.unet.config, "time_cond_proj_dim": 256})
    assert converted(pipeline).keys() == plain.keys()


def test_a_weight_without_a_name_in_the_layout_is_refused():
    pipeline = stable_diffusion(SD1, "quick_gelu")
    pipeline.unet = UNet2DConditionModel(**{**pipeline.unet.config, "class_embed_type": "timestep"})
    with pytest.raises(StageError, match=r"original layout has no name for class_embedding\.linear_1"):
        converted(pipeline)
