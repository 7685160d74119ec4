from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config
from stages.methods.base import Materials, OneStepConfig
from stages.training import Method, TrainingSettings


class DiscriminatorSettings(Config):
    """The conditional diffusion discriminator, and how it is optimised: where nothing is said, as the student is."""

    weights: Literal["teacher", "random"] = Field("teacher", description="what its U-Net begins with")
    noise: bool = Field(True, description="whether it sees the noise that the student started from")
    multi_scale: bool = Field(
        True,
        description="whether resized latents enter at every scale and features are judged at every scale; otherwise "
        "the U-Net's last features alone",
    )
    learning_rate: float | None = Field(None, gt=0, description="its peak; default: the student's")
    betas: tuple[float, float] = Field(
        (0.0, 0.99), strict=False, description="AdamW's; without momentum, as discriminators are usually trained"
    )
    r1_weight: float = Field(
        0.001,
        ge=0,
        description="of the R1 penalty, of the gradient of the sum of logits over positions; the default is for "
        "latents of 8x8 and has to fall as their number of positions grows: 1.6e-5 for 64x64; 0: none",
    )
    r1_every: int = Field(16, ge=1, description="steps from one penalty to the next, each counted as often")
    mix_and_match: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the generated latents that is replaced by a target of the batch with the noise, the "
        "text, or both of another, to be recognised as false; needs batches of two and more",
    )

    def training(self, student: TrainingSettings) -> TrainingSettings:
        """The student's settings with its own in place of them."""
        rate = self.learning_rate or student.learning_rate
        return student.model_copy(update={"learning_rate": rate, "betas": self.betas})


class Diffusion2GANConfig(OneStepConfig):
    """Diffusion2GAN (Kang et al. 2024, 2405.05967): regression on ODE pairs, in the paper with E-LatentLPIPS, plus a
    conditional GAN whose multi-scale discriminator starts from the teacher's U-Net.

    `gan_weight: 0` leaves the regression alone; each other ingredient has its switch under `discriminator`. Beside a
    student that regression has already brought to its targets, the discriminator finds nothing to tell apart for long.

    Not published, and so Retort's choice: the weight of the GAN term, by the sweep of
    manifests/digit_scenes_gan_sweep.yaml (0.3 of 0.1, 0.3 and 1); that of R1, by digit_scenes_r1.yaml (0.001 of 0,
    0.001, 0.01, 0.1 and 1: more makes the discriminator weaker and the student no better); the share of mix-and-match,
    which made it worse when larger there; learning rates, betas, clipping; every map of logits counting alike; and
    what is judged without `multi_scale`.
    """

    VERSION: ClassVar[int] = 2
    name: Literal["diffusion2gan"] = "diffusion2gan"
    gan_weight: float = Field(0.3, ge=0, description="of the GAN term beside the distance; 0: no discriminator at all")
    discriminator: DiscriminatorSettings = Field(
        DiscriminatorSettings(), description="what judges the student's latents"
    )

    @model_validator(mode="after")
    def _has_a_discriminator(self) -> Self:
        if self.gan_weight == 0 and self.discriminator != DiscriminatorSettings():
            raise ValueError("gan_weight: 0 trains no discriminator: leave its settings out")
        return self

    def create(self, materials: Materials) -> Method:
        from stages.methods.diffusion2gan.method import Diffusion2GAN

        return Diffusion2GAN(self, materials)
