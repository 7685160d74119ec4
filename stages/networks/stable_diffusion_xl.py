"""The adapter of Stable Diffusion XL: Stable Diffusion with two text encoders, and sizes as a further condition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from stages.base import Config
from stages.diffusion.form import Form
from stages.networks.adapter import INDEX, Unsupported, read_json
from stages.networks.stable_diffusion import CLIP_WIDTH, TEXT, StableDiffusion, encode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.networks.condition import Condition

POOLED, TIME_IDS = "text_embeds", "time_ids"
"""The names of the condition's other tensors, as the U-Net calls them: (B, D) and (B, 6)."""
MICRO_CONDITIONING = "micro_conditioning.json"
"""The file of a teacher's folder that holds its micro-conditioning, if it is not the pipeline's default."""

Size = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]
Corner = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], Field(strict=False)]


class MicroConditioning(Config):
    """The sizes on which SDXL is conditioned, in pixels (Podell et al. 2023, 2307.01952, section 2.2).

    Defaults are those of diffusers' pipeline: an image of the pipeline's size that was neither resized nor cropped."""

    original_size: Size | None = Field(
        None,
        description="height and width of the training image before resizing; default: those of the teacher's images",
    )
    crops_coords_top_left: Corner = Field(
        (0, 0), description="top and left of the crop of the training image; [0, 0]: a centred object"
    )
    target_size: Size | None = Field(
        None, description="height and width of the generated image; default: those of the teacher's images"
    )


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (Podell et al. 2023, 2307.01952). Prompts go to both text encoders.

    The U-Net's cross-attention reads the penultimate states of both encoders, concatenated. The pooled text of the
    second encoder and six sizes in pixels, the time ids, are added to the embedding of the timestep.

    The unconditional condition has zeros in place of texts if the pipeline's `force_zeros_for_empty_prompt` is true. It
    then differs from the condition of the empty prompt.

    The VAE computes in float32, whatever the teacher's dtype is. SDXL's VAE gives NaN in float16, as its config says
    with `force_upcast`."""

    COMPONENTS: ClassVar[Mapping[str, str | None]] = {
        **StableDiffusion.COMPONENTS,
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": None,
    }
    FILES = (
        *StableDiffusion.FILES,
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/*.*",
    )
    SUPPORTS = (
        "Stable Diffusion XL base layout (StableDiffusionXLPipeline: the same with CLIPTextModelWithProjection as the "
        "second text encoder; no refiner, no inpainting)"
    )
    FURTHER_INPUTS = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    DROPPED: ClassVar[Mapping[str, Any]] = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    MICRO_CONDITIONING = True

    @classmethod
    def check(cls, folder: Path) -> None:
        super().check(folder)
        unet = read_json(folder / "unet" / "config.json")
        if unet.get("addition_embed_type") != "text_time":
            raise Unsupported(f"{folder}'s unet has addition_embed_type: {unet.get('addition_embed_type')}")
        pooled = read_json(folder / "text_encoder_2" / "config.json").get("projection_dim", CLIP_WIDTH)
        taken = unet.get("projection_class_embeddings_input_dim")
        given = pooled + 6 * (unet.get("addition_time_embed_dim") or 0)
        if taken != given:
            raise Unsupported(
                f"{folder}'s unet is conditioned on {taken} features beside the text states, not on the {given} of a "
                "pooled text and six sizes (a refiner has five)"
            )

    @classmethod
    def text_width(cls, folder: Path) -> int:
        second = read_json(folder / "text_encoder_2" / "config.json").get("hidden_size", CLIP_WIDTH)
        return super().text_width(folder) + int(second)

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        super().__init__(folder, device=device, dtype=dtype, compile=compile)
        encoder = CLIPTextModelWithProjection.from_pretrained(
            folder, subfolder="text_encoder_2", use_safetensors=True, dtype=self.dtype
        )
        self.text_encoder_2 = self._frozen(encoder)
        self.tokenizer_2 = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
        self.zeros_for_dropped = bool(read_json(folder / INDEX).get("force_zeros_for_empty_prompt", True))
        stored = folder / MICRO_CONDITIONING
        self.micro = MicroConditioning.model_validate(read_json(stored) if stored.exists() else {})

    @property
    def time_ids(self) -> list[int]:
        """The original size, the top left corner of the crop, and the target size, in pixels."""
        micro, pixels = self.micro, self.image_size_of(self.folder) or (0, 0)
        return [*(micro.original_size or pixels), *micro.crops_coords_top_left, *(micro.target_size or pixels)]

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        import torch

        first = encode(self.tokenizer, self.text_encoder, [prompt], output_hidden_states=True)
        second = encode(self.tokenizer_2, self.text_encoder_2, [prompt], output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        time_ids = torch.tensor(self.time_ids, dtype=self.dtype, device=self.device)
        return {TEXT: text[0], POOLED: second.text_embeds[0], TIME_IDS: time_ids}

    def encode_dropped(self) -> Condition:
        import torch

        from stages.networks.condition import Condition

        empty = super().encode_dropped()
        if not self.zeros_for_dropped:
            return empty
        zeros = {name: torch.zeros_like(empty.tensors[name]) for name in (TEXT, POOLED)}
        return Condition(1, {**empty.tensors, **zeros})

    def pipeline(self, **components: Any) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            force_zeros_for_empty_prompt=self.zeros_for_dropped,
            add_watermarker=False,
            **components,
        )

    def single_file(self, network: Any, form: Form) -> dict[str, Tensor]:
        from stages.networks.single_file import stable_diffusion_xl

        encoders = self.text_encoder, self.text_encoder_2
        return stable_diffusion_xl(network, self.vae, *encoders, form.prediction == "v_prediction")

    @property
    def call_settings(self) -> Mapping[str, Any]:
        """The sizes, if they are not the pipeline's defaults."""
        return {name: value for name, value in self.micro if name in self.micro.model_fields_set}
