from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config
from stages.methods.base import Materials, OneStepConfig
from stages.training import Method, TrainingSettings


class DiscriminatorSettings(Config):
    """The conditional diffusion discriminator and its optimizer. All other training settings are the student's."""

    weights: Literal["teacher", "random"] = Field("teacher", description="initial weights of the discriminator's U-Net")
    noise: bool = Field(True, description="whether the discriminator takes the student's input noise as a condition")
    multi_scale: bool = Field(
        True,
        description="whether the discriminator takes resized latents as inputs and gives logits at every scale; if "
        "false, it gives logits for the U-Net's last features only",
    )
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; default: the student's")
    betas: tuple[float, float] = Field(
        (0.0, 0.99), strict=False, description="betas of AdamW; the default has no momentum, as usual in GANs"
    )
    r1_weight: float = Field(
        0.1,
        ge=0,
        description="weight of the R1 penalty, the squared gradient of the sum of logits over positions; 0: no "
        "penalty; the default is for 8x8 latents; larger latents need a smaller weight, such as 1.6e-3 for 64x64",
    )
    r1_every: int = Field(16, ge=1, description="steps between two R1 penalties; each is multiplied by this number")
    mix_and_match: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the discriminator's fake samples that are replaced by real latents with the wrong noise, "
        "the wrong text, or both; needs a batch size of at least 2",
    )

    def training(self, student: TrainingSettings) -> TrainingSettings:
        """Return the discriminator's training settings: the student's, with another learning rate and other betas."""
        rate = self.learning_rate or student.learning_rate
        return student.model_copy(update={"learning_rate": rate, "betas": self.betas})


class Diffusion2GANConfig(OneStepConfig):
    """Diffusion2GAN (Kang et al. 2024, 2405.05967): one-step regression on ODE pairs plus a conditional GAN.

    The paper's regression loss is E-LatentLPIPS. The multi-scale discriminator starts from the teacher's U-Net.
    `gan_weight: 0` trains by regression only. Settings of `discriminator` switch off its single parts.

    The paper does not publish some values, so Retort chose them, with manifests/gan_weight.yaml. `gan_weight` is 0.1,
    chosen from 0.1, 0.3 and 1. `r1_weight` is 0.1, chosen from 0, 0.001, 0.01, 0.1 and 1. `mix_and_match` is 0.25,
    which was not tuned.

    Retort also chose the learning rates, the betas, the clipping, the equal weights of all maps of logits, and the
    features that get logits without `multi_scale`.
    """

    VERSION: ClassVar[int] = 2
    LEARNS_RANGE: ClassVar[bool] = True
    name: Literal["diffusion2gan"] = "diffusion2gan"
    gan_weight: float = Field(0.1, ge=0, description="weight of the GAN loss; 0: no discriminator")
    discriminator: DiscriminatorSettings = Field(
        DiscriminatorSettings(), description="the discriminator and its training"
    )

    @model_validator(mode="after")
    def _has_a_discriminator(self) -> Self:
        if self.gan_weight == 0 and self.discriminator != DiscriminatorSettings():
            raise ValueError("gan_weight: 0 trains no discriminator; leave its settings out")
        return self

    @property
    def has_discriminator(self) -> bool:
        return self.gan_weight > 0

    def create(self, materials: Materials) -> Method:
        from stages.methods.diffusion2gan.method import Diffusion2GAN

        return Diffusion2GAN(self, materials)
