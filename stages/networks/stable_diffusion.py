"""The adapter of Stable Diffusion 1.x and 2.x: a U-Net, a VAE and a CLIP text encoder of stock diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stages.diffusion.form import Form
from stages.networks.adapter import Adapter, Unsupported, read_json
from stages.networks.lora import FILE, UNET_TARGETS
from stages.networks.scaling import to_network, to_vae

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition
    from stages.networks.unet_features import Bottleneck, Features

CACHED_PROMPTS = 4096
"""The maximum number of prompts whose text states are cached."""
VAE_PIXELS = 4 * 512 * 512
"""Pixels that the VAE processes at once: four images of 512 x 512. The largest float32 activation then has 1.1 GB."""
GUIDANCE_EMBEDDING = 256
"""The width of the guidance embedding, the same as in diffusers' distilled models."""
CLIP_WIDTH = 512
"""The width of a CLIP text encoder whose config does not give it."""
ONE_FILE = "1TB"
"""The size above which diffusers splits weights into several files. It is so large that there is always one, as in
FILES."""
TEXT = "text"
"""The name of the condition's tensor: text states (B, L, D)."""


class StableDiffusion(Adapter):
    """Stable Diffusion. Latents are those of the VAE, multiplied by its `scaling_factor`. Prompts are texts."""

    COMPONENTS: ClassVar[Mapping[str, str | None]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": None,
        "scheduler": None,
    }
    FILES: ClassVar[tuple[str, ...]] = (
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*.*",
        "scheduler/scheduler_config.json",
    )
    SUPPORTS = (
        "Stable Diffusion 1.x or 2.x layout (StableDiffusionPipeline: UNet2DConditionModel, AutoencoderKL, "
        "CLIPTextModel, a scheduler with betas; safetensors weights)"
    )
    FURTHER_INPUTS: ClassVar[tuple[str, ...]] = (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    )
    DROPPED: ClassVar[Mapping[str, Any]] = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    FEATURES = True
    LORA_TARGETS = UNET_TARGETS

    @classmethod
    def check(cls, folder: Path) -> None:
        super().check(folder)
        unet, vae = (read_json(folder / name / "config.json") for name in (cls.NETWORK, "vae"))
        if vae.get("latent_channels") != unet["in_channels"]:
            found = f"latents of {vae.get('latent_channels')} channels, its {cls.NETWORK} takes {unet['in_channels']}"
            raise Unsupported(f"{folder}'s vae makes {found}")
        states = cls.text_width(folder)
        if unet.get("cross_attention_dim") != states:
            taken = unet.get("cross_attention_dim")
            raise Unsupported(f"{folder}'s text has states of {states} features, its {cls.NETWORK} takes {taken}")

    @classmethod
    def text_width(cls, folder: Path) -> int:
        """Return the number of features of the text states."""
        return int(read_json(folder / "text_encoder" / "config.json").get("hidden_size", CLIP_WIDTH))

    @classmethod
    def image_size_of(cls, folder: Path) -> tuple[int, int] | None:
        size = super().image_size_of(folder)
        halvings = len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1
        return size and (size[0] * 2**halvings, size[1] * 2**halvings)

    @classmethod
    def guidance_error(cls, folder: Path, as_input: bool) -> str | None:
        return None

    @classmethod
    def network_class(cls) -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModel

        super().__init__(folder, device=device, dtype=dtype, compile=compile)
        encoder = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", use_safetensors=True, dtype=self.dtype
        )
        self.text_encoder = self._frozen(encoder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self._encoded: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def vae(self) -> Any:
        """The VAE, in float32 because Stable Diffusion's overflows in float16.

        It is loaded at the first use, because making pairs does not need it."""
        import torch
        from diffusers import AutoencoderKL

        return self._frozen(
            AutoencoderKL.from_pretrained(self.folder, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32)
        )

    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """Return the text states (B, L, D), in the teacher's dtype."""
        return self.encode_prompts(prompts).tensors[TEXT]

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Return the condition for `prompts`, in the teacher's dtype.

        The encoders' output is cached by prompt, on the CPU: 4,096 prompts of SDXL take 2.6 GB in float32."""
        import torch

        from stages.networks.condition import Condition

        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if len(self._encoded) + len(new) > CACHED_PROMPTS:
            self._encoded.clear()
            new = list(dict.fromkeys(prompts))
        # Prompts are encoded one at a time and without autocast, so that cached states do not depend on the caller.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for prompt in new:
                self._encoded[prompt] = {name: value.cpu() for name, value in self._encode(prompt).items()}
        rows = [self._encoded[prompt] for prompt in prompts]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return Condition(len(rows), {name: value.to(self.device) for name, value in stacked.items()})

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        """Return the tensors of the condition for one prompt, without the batch dimension."""
        return {TEXT: encode(self.tokenizer, self.text_encoder, [prompt])[0][0]}

    @staticmethod
    def conditioned_on(states: Tensor) -> Condition:
        """Return the condition for states (B, L, D) of the text encoder."""
        from stages.networks.condition import Condition

        return Condition(len(states), {TEXT: states})

    @classmethod
    def predict(cls, network: Any, z: Tensor, level: Level, condition: Condition, w: Tensor | None = None) -> Tensor:
        from stages.diffusion.guidance import embed
        from stages.networks.camera import CAMERA, labels

        guidance = {}
        if w is not None:
            guidance["timestep_cond"] = embed(w, network.config["time_cond_proj_dim"]).to(z.dtype)
        added = dict(condition.to(z).tensors)
        text, seen = added.pop(TEXT), labels(None, added.pop(CAMERA, None))
        output: Tensor = network(z, level.timestep, text, seen, added_cond_kwargs=added, **guidance).sample
        return output

    @property
    def down_sampling(self) -> int:
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def decode(self, latents: Tensor) -> Tensor:
        import torch

        parts = to_vae(latents.to(self.device, torch.float32), self.vae.config).split(
            _at_once(latents, self.down_sampling**2)
        )
        with torch.no_grad():
            return torch.cat([self.vae.decode(z).sample.cpu() for z in parts]).clamp(-1, 1)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        import torch

        with torch.autocast(self.device.type, enabled=False):
            images: Tensor = self.vae.decode(to_vae(latents.float(), self.vae.config)).sample
            return images

    def encode(self, images: Tensor) -> Tensor:
        """Encode images as the mean of the VAE's posterior, multiplied by its scaling factor."""
        import torch

        parts = images.to(self.device, torch.float32).split(_at_once(images, 1))
        with torch.no_grad():
            return torch.cat([self.encode_with_gradient(x) for x in parts])

    def encode_with_gradient(self, images: Tensor) -> Tensor:
        import torch

        with torch.autocast(self.device.type, enabled=False):
            return to_network(self.vae.encode(images.float()).latent_dist.mode(), self.vae.config)

    def save_pipeline(self, network: Any, scheduler: Any, folder: Path) -> None:
        """Write a pipeline. A U-Net without a guidance embedding gets one with zero weights.

        diffusers applies no classifier-free guidance to a U-Net with a guidance embedding. Guidance is built into the
        student and must not be applied again."""
        embedded = network.config["time_cond_proj_dim"] is not None
        unet = network if embedded else self.with_guidance_embedding(network)
        pipeline = self.pipeline(unet=unet, scheduler=scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=ONE_FILE)

    def pipeline(self, **components: Any) -> Any:
        """Return a diffusers pipeline of `components` (U-Net and scheduler) and the teacher's other components."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **components,
        )

    def with_guidance_embedding(self, network: Any) -> Any:
        """Return a network with a guidance embedding of zeros. It shares the memory of the weights of `network`."""
        import torch

        from stages.networks.compute import remade

        embedded = remade(network, "meta", time_cond_proj_dim=GUIDANCE_EMBEDDING)
        missing, unexpected = embedded.load_state_dict(network.state_dict(), strict=False, assign=True)
        assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
        layer = embedded.time_embedding.cond_proj
        layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight, device=network.device))
        return embedded

    def with_camera(self, network: Any) -> Any:
        from stages.networks.camera import add_camera

        return add_camera(network)

    def features(self, network: Any, multi_scale: bool) -> Features:
        from stages.networks.unet_features import Features

        return Features(network, multi_scale)

    def bottleneck(self, network: Any) -> Bottleneck:
        from stages.networks.unet_features import Bottleneck

        return Bottleneck(network)

    def plain_lora_error(self, form: Form) -> str | None:
        return "LoRA weights cannot hold its guidance embedding" if form.w_range else None

    def usage(self, form: Form, scheduler: str, lora: bool = False) -> str:
        scale = f"guidance_scale={1 + sum(form.w_range) / 2:g}, " if form.w_range else ""
        remark = "" if form.w_range else "  # any guidance_scale gives the same"
        prompt = '"a prompt"' + "".join(f", {name}={value}" for name, value in self.call_settings.items())
        if lora:
            return f"""from diffusers import DiffusionPipeline, {scheduler}

pipeline = DiffusionPipeline.from_pretrained("THE TEACHER")
pipeline.load_lora_weights("THIS FOLDER", weight_name="{FILE}")
pipeline.scheduler = {scheduler}.from_pretrained("THIS FOLDER", subfolder="scheduler")
image = pipeline({prompt}, guidance_scale=1.0, {_steps(form)}).images[0]  # guidance is built in"""
        return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")
image = pipeline({prompt}, {scale}{_steps(form)}).images[0]{remark}"""

    def single_file(self, network: Any, form: Form) -> dict[str, Tensor]:
        from stages.networks import single_file

        return single_file.stable_diffusion(network, self.vae, self.text_encoder)


def _steps(form: Form) -> str:
    """Return the argument that gives a pipeline the steps of `form`."""
    return f"timesteps={list(form.levels)}" if form.levels else f"num_inference_steps={form.steps}"


def _at_once(batch: Tensor, pixels_per_element: int) -> int:
    """Return the number of samples that the VAE processes at once. It needs much more memory than the U-Net.

    `batch` is (B, C, H, W). `pixels_per_element` is the number of image pixels for each of its positions."""
    pixels = batch.shape[-1] * batch.shape[-2] * pixels_per_element
    return min(64, max(1, VAE_PIXELS // pixels))


def encode(tokenizer: Any, text_encoder: Any, texts: Sequence[str], **options: Any) -> Any:
    """Return the encoder's output for texts, padded or cut to the tokenizer's length, as in diffusers' pipelines.

    `options` are passed to the encoder. Item 0 of the output of a CLIPTextModel is the last states (B, L, D)."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(next(text_encoder.parameters()).device), **options)
