"""The settings of the objectives. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stages.base import Config
from stages.diffusion.config import TimeRange
from stages.diffusion.weighting import NoiseWeighting
from stages.methods.matching import FakeScoreSettings
from stages.networks.lora import LoraSettings
from stages.optimize.config import ObjectiveConfig, ObjectiveMaterials
from stages.training import Method, TrainingSettings


class Anneal(Config):
    """Another range of timesteps for the later part of training."""

    after: int = Field(ge=1, description="number of training steps before the other range applies")
    time_range: TimeRange = Field(
        (0.02, 0.5),
        description="range of the random timesteps from that step on, as fractions of T; threestudio: up to 0.5",
    )


class ScoreDistillationConfig(ObjectiveConfig):
    """Settings that SDS and VSD share."""

    guidance_scale: float
    weighting: NoiseWeighting = Field(
        "sigma2",
        description="weight of the difference of two noise estimates: sigma2 means sigma^2, uniform means 1, and "
        "alpha_sigma2 means alpha sigma^2",
    )
    time_range: TimeRange = Field((0.02, 0.98), description="range of the random timesteps, as fractions of T")
    anneal: Anneal | None = Field(None, description="another time_range for the later part of training; default: none")

    @property
    def uses_guidance(self) -> bool:
        return self.guidance_scale > 1

    def check(self, steps: int) -> Iterator[tuple[str, str]]:
        if self.anneal and self.anneal.after >= steps:
            yield "anneal.after", f"there are only {steps} training steps"


class SDSConfig(ScoreDistillationConfig):
    """Score distillation sampling (DreamFusion, Poole et al. 2022, 2209.14988): particles climb to a mode of the noised
    and guided density of the teacher. Particles of one prompt become similar."""

    name: Literal["sds"] = "sds"
    guidance_scale: float = Field(
        100.0,
        ge=1,
        description="guidance scale s of the teacher, u + s (c - u), as in diffusers; threestudio's SDS uses c + s (c "
        "- u), so its scale of 100 is 101 here",
    )

    def create(self, materials: ObjectiveMaterials) -> Method:
        from stages.optimize.objectives.sds import SDS

        return SDS(self, materials)


class ParticleScore(FakeScoreSettings):
    """The score of the particles' renders and its optimizer. All other training settings are those of the particles."""

    learning_rate: float | None = Field(1e-4, gt=0, description="peak learning rate; null: that of the particles")
    lora: LoraSettings | None = Field(
        LoraSettings(),
        description="train only LoRA weights and share all other weights with the teacher; on by default; null: train "
        "all weights",
    )
    turns: int = Field(1, ge=1, description="steps of the score for each step of the particles")

    def training(self, student: TrainingSettings) -> TrainingSettings:
        """Return the score's training settings: the particles', with another learning rate and a network's epsilon."""
        return super().training(student).model_copy(update={"eps": TrainingSettings.model_fields["eps"].default})


class VSDConfig(ScoreDistillationConfig):
    """Variational score distillation (ProlificDreamer, Wang et al. 2023, 2305.16213): the distribution of the particles
    approaches that of the teacher. Needs no large guidance scale."""

    name: Literal["vsd"] = "vsd"
    guidance_scale: float = Field(
        7.5,
        ge=1,
        description="guidance scale s of the teacher, u + s (c - u), as in diffusers and in threestudio's VSD; the "
        "score of the particles is not guided",
    )
    score: ParticleScore = Field(ParticleScore(), description="the score of the particles and its training")
    drop_camera: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of views for which the score is trained without the camera; not for latents and images",
    )

    def create(self, materials: ObjectiveMaterials) -> Method:
        from stages.optimize.objectives.vsd import VSD

        return VSD(self, materials)
