"""Settings inside `kind: teacher`."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, Strict, field_validator, model_validator

from stages.base import Choice, Config, Content, Input, Neutral, StageError
from stages.data.images.config import IMAGE_SETS, ImageSet
from stages.diffusion.prediction import Prediction
from stages.networks.adapters import files_of
from stages.networks.coop import BridgeSettings, CoopSettings
from stages.training import TrainingSettings

SHIPPED = Path(__file__).parent / "shipped"
FROM = Content("revision", files_of, shipped={name: SHIPPED / name for name in ("digits", "digit_scenes")})
"""The marker of a field that names a pipeline."""
TIMESTEPS = 1000
"""Number of timesteps of a teacher that Retort trains. Its noise schedule is Stable Diffusion's."""

EPSILON = (
    "the pipeline predicts epsilon, from which x0 cannot be computed at pure noise; give one that predicts v or x0"
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Suffixes of files of weights that PyTorch writes as pickles."""


def _times(value: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= value[0] < value[1] <= TIMESTEPS:
        raise ValueError(f"should be two integers from 0 to {TIMESTEPS}, the first less than the second")
    return value


Times = Annotated[tuple[int, int], Strict(False), AfterValidator(_times)]
"""Timesteps from the first number up to the second, which is not included."""


def _shared(value: Any) -> Any:
    """Convert the short form of `vae`, the name of a stage, to settings."""
    return {"teacher": value} if isinstance(value, str) else value


class VaeSettings(Config):
    """The autoencoder that encodes images as the denoiser's latents. A teacher's name instead of settings means the
    autoencoder and the scaling factor of that teacher."""

    teacher: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None, description="teacher whose autoencoder and scaling factor are used; default: a new one is trained"
    )
    channels: list[int] = Field(
        [32, 64], min_length=2, description="channels of each level; each level after the first halves the side"
    )
    training: TrainingSettings = Field(TrainingSettings(steps=400), description="how the autoencoder is trained")
    max_mse: float = Field(0.01, gt=0, description="largest mean squared error allowed on held-out images in [-1, 1]")

    @model_validator(mode="after")
    def _trained_or_taken(self) -> Self:
        own = VaeSettings.model_construct() if self.teacher else None
        for name in ("channels", "training", "max_mse"):
            if own and getattr(self, name) != getattr(own, name):
                raise ValueError(f"the autoencoder of another teacher is not trained: leave {name} out")
        return self


class DenoiserSettings(Config):
    """The U-Net and the text encoder. They are trained together, on the autoencoder's latents. With `like`, only the
    U-Net is trained."""

    channels: list[int] = Field(
        [48, 96], min_length=1, description="channels of each U-Net level; the last level has attention"
    )
    training: TrainingSettings = Field(
        TrainingSettings(steps=1000), description="how U-Net and text encoder are trained"
    )


class TrainedTeacher(Config):
    """A small pipeline that Retort trains: VAE, tokenizer, text encoder, conditional U-Net and DDIM scheduler. With
    `like`, only a new network for another teacher's pipeline is trained, and `vae` must be left out."""

    dataset: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(
        description="image set to train on, with its captions"
    )
    like: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None,
        description="a teacher whose pipeline is used; only a new network with `denoiser.channels` is trained for it; "
        "students of that teacher can start from this network",
    )
    start: Annotated[str | None, Input("teacher"), Neutral()] = Field(
        None,
        description="a teacher of Stable Diffusion's layout; training starts from its U-Net, text encoder and "
        "tokenizer, on images of any size (a resolution boost); default: random weights",
    )
    prediction: Prediction = Field(
        "v_prediction", description="what the U-Net predicts: the noise (epsilon), v, or x0 (sample)"
    )
    drop_text: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of prompts that training replaces by the empty prompt; above 0 if the teacher will be "
        "guided",
    )
    times: Annotated[Times | None, Neutral()] = Field(
        None,
        description="timesteps that the network is trained on: [500, 1000] for a structure network (PanGu-Draw, "
        "2312.16486); default: all",
    )
    upscaled: Annotated[float, Neutral()] = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training images that are scaled to half their size and up again, to simulate small "
        "images, from which a structure network can learn",
    )
    crop: Annotated[int | None, Neutral()] = Field(
        None,
        ge=8,
        description="side of random crops to train on, in pixels, which make steps of a texture network cheaper; it "
        "still samples whole images; default: whole images",
    )
    vae: Annotated[VaeSettings, BeforeValidator(_shared, json_schema_input_type=str | VaeSettings)] = Field(
        VaeSettings(), description="the autoencoder, which is trained first; or a teacher whose autoencoder is used"
    )
    denoiser: DenoiserSettings = Field(
        DenoiserSettings(), description="the U-Net; it is trained on the autoencoder's latents"
    )

    @model_validator(mode="after")
    def _keeps_what_it_is_like(self) -> Self:
        for name in ("prediction", "vae"):
            if self.like and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"like keeps the {name} of that teacher: leave {name} out")
        return self

    @model_validator(mode="after")
    def _sizes_halve(self) -> Self:
        if self.like or self.vae.teacher:
            return self
        step = 2 ** (len(self.vae.channels) + len(self.denoiser.channels) - 2)
        if self.dataset.size % step:
            raise ValueError(
                f"images of {self.dataset.size} pixels cannot be halved at every level: give a multiple of {step}"
            )
        return self

    @model_validator(mode="after")
    def _has_data_of_its_own(self) -> Self:
        for name in ("times", "upscaled", "crop", "start"):
            if self.like and getattr(self, name):
                raise ValueError(f"like trains a new network on all timesteps of whole images: leave {name} out")
        if self.crop and self.crop > self.dataset.size:
            raise ValueError(f"crop: {self.crop} is larger than the images of {self.dataset.size} pixels")
        return self

    @property
    def latent_size(self) -> int:
        """Side of a latent: the side of an image, halved at each level of the autoencoder after the first."""
        return self.dataset.size >> (len(self.vae.channels) - 1)


class TeacherLora(Config):
    """A LoRA that is fused into the weights of the pipeline in `from`. Weights W become W + scale * alpha / rank * B A,
    with A, B, alpha and rank of the file (Hu et al. 2021, 2106.09685, section 4.1)."""

    weights: Annotated[str, Content("revision", files=("*.safetensors",))] = Field(
        description="a safetensors file, or a folder or hub id that holds one, in a format that diffusers loads"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub id")
    file: str | None = Field(
        None, description="name of the safetensors file, if the folder or the hub repository holds several"
    )
    scale: float = Field(1.0, description="factor of the LoRA's change of the weights, like lora_scale in diffusers")

    @field_validator("weights")
    @classmethod
    def _no_pickle(cls, weights: str) -> str:
        if PurePath(weights).suffix in PICKLES:
            raise ValueError(f"{weights} may hold a pickle, which can run code; give a safetensors file")
        return weights

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str) -> str:
        if PurePath(file).suffix != ".safetensors" or PurePath(file).name != file:
            raise ValueError("give the name of a safetensors file at the top of the folder or repository")
        return file

    def found_in(self, source: Path) -> Path:
        """Return the LoRA's file: `source` itself, or one in the folder `source`.

        Raises StageError if the folder does not hold `file`, or if `file` is None and the folder does not hold exactly
        one safetensors file."""
        if not source.is_dir():
            if self.file:
                raise StageError(f"{self.weights} is a file; leave `file` out")
            return source
        files = sorted(source.glob("*.safetensors"))
        names = ", ".join(file.name for file in files)
        if self.file:
            files = [source / self.file]
        if not files:
            raise StageError(f"{self.weights} holds no safetensors file; give the folder of a LoRA")
        if len(files) > 1:
            raise StageError(f"{self.weights} holds {names}; set `file` to one of them")
        if not files[0].is_file():
            raise StageError(f"{self.weights} holds no {self.file}; it holds {names or 'no safetensors file'}")
        return files[0]


class ExactSettings(Config):
    """The optimal denoiser of a set of images, in closed form. It needs no training.

    For latents x_i of the images and a spread h it is E[x | z] = sum_i w_i (x_i + alpha h^2 / s^2 (z - alpha x_i)),
    with s^2 = sigma^2 + alpha^2 h^2 and w = softmax_i(-|z - alpha x_i|^2 / (2 s^2)). Samples in many steps are the
    images with noise of standard deviation h. With a prompt, the sum is over the images with that caption only.
    Students start from the network of `pipeline`. `zero_terminal_snr` is algorithm 1 of Lin et al. 2023
    (2305.08891)."""

    images: Annotated[ImageSet, Choice("name", IMAGE_SETS)] = Field(
        description="image set whose training images the teacher draws"
    )
    count: int | None = Field(None, ge=1, description="number of images, chosen at random; default: all")
    spread: float = Field(
        0.1,
        gt=0,
        description="standard deviation h of the data around each latent; a smaller spread is harder to learn",
    )
    captions: Literal["full", "none"] = Field(
        "full",
        description="full: the images' captions are the prompts; none: the teacher is unconditional; if a caption has "
        "only one image, all noises give that image",
    )
    zero_terminal_snr: Annotated[bool, Neutral()] = Field(
        False,
        description="whether to rescale the pipeline's noise schedule so that it ends in pure noise; without it, the "
        "distribution of samples, which start from pure noise, is not quite that of the images",
    )
    pipeline: Annotated[str, FROM] = Field(
        "digit_scenes",
        description="a diffusers folder, a hub id or digit_scenes: its VAE makes the latents, and students start "
        "from its network",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


class CoopTeacher(CoopSettings):
    """Two teachers in one sampling process (Coop-Diffusion, PanGu-Draw, 2312.16486). The guest's estimate of the image
    is decoded, encoded by the host's VAE, and mixed into the host's estimate. Both need images of the same size, but
    may have different latents."""

    host: Annotated[str, Input("teacher")] = Field(description="teacher whose latents are sampled")
    guest: Annotated[str, Input("teacher")] = Field(description="teacher that steers the host")


class BridgeTeacher(BridgeSettings):
    """Two teachers of images of different sizes along one trajectory (PanGu-Draw, 2312.16486). The guest samples at
    noisy timesteps. Its estimate of the image is decoded, scaled, encoded by the host's VAE and noised again. The host
    samples from there.
    """

    host: Annotated[str, Input("teacher")] = Field(description="teacher that is called below `switch`")
    guest: Annotated[str, Input("teacher")] = Field(description="teacher that is called from `switch` on")


class GaussianSettings(Config):
    """The analytic teacher of data from N(mean, std^2). Each call sleeps for `delay` seconds, to simulate a network."""

    mean: float = Field(0.0, description="mean of every element")
    std: float = Field(1.0, gt=0, description="standard deviation of every element")
    shape: list[int] = Field(
        [4, 8, 8], min_length=3, max_length=3, description="shape of a latent: channels, height, width"
    )
    delay: float = Field(0.0, ge=0, description="seconds to sleep at each call, to simulate a network")
