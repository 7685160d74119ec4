"""The settings that DMD and DMD2 share. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from stages.base import Config
from stages.diffusion.config import TimeRange
from stages.diffusion.form import Form
from stages.diffusion.weighting import FakeWeighting, ScoreWeighting
from stages.methods.base import Materials, MethodConfig
from stages.networks.lora import LoraSettings
from stages.training import TrainingSettings

if TYPE_CHECKING:
    from stages.losses.score import ScoreDifference
    from stages.networks.fake_score import FakeScore


class FakeScoreSettings(Config):
    """The fake score and its optimizer. All other training settings are the student's."""

    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; default: the student's")
    lora: LoraSettings | None = Field(
        None,
        description="train only LoRA weights and share all other weights with the teacher; {} for the default "
        "settings; default: train all weights",
    )
    weighting: FakeWeighting = Field(
        "output",
        description="squared error to minimise; output: error of the network's output; snr: error of the noise (DMD "
        "for Stable Diffusion); edm: (snr + 4) times the error of x0 (DMD for EDM's teachers)",
    )

    @model_validator(mode="after")
    def _is_not_exported(self) -> Self:
        if self.lora and self.lora.merged:
            raise ValueError("lora.merged has no effect: the fake score is not exported")
        return self

    def training(self, student: TrainingSettings) -> TrainingSettings:
        """Return the fake score's training settings: the student's, with another learning rate."""
        return student.model_copy(update={"learning_rate": self.learning_rate or student.learning_rate})


class MatchingConfig(MethodConfig):
    """Base class of methods that match the distributions of student and teacher by the difference of their scores.

    The student keeps its teacher's prediction type."""

    guidance_scale: float | None = Field(
        None,
        ge=1,
        description="guidance scale of the real score, which the student learns; the fake score has none; default: the "
        "scale of the pairs; required without pairs",
    )
    weighting: ScoreWeighting = Field(
        "dmd",
        description="weight of mu_fake - mu_real; dmd: 1 / mean|x - mu_real| of each sample; constant: 1; "
        "sigma2_over_alpha: sigma^2 / alpha",
    )
    time_range: TimeRange = Field(
        (0.02, 0.98), description="range of timesteps at which the two scores are compared, as fractions of T"
    )
    fake_score: FakeScoreSettings = Field(FakeScoreSettings(), description="the fake score and its training")

    def matching(self, materials: Materials, fake: FakeScore) -> ScoreDifference:
        """Return the gradient of distribution matching, with the teacher of `materials` as the real score."""
        from stages.losses.score import ScoreDifference

        all_steps = Form(steps=len(materials.teacher.schedule), guidance_scale=self.guidance_scale)
        real = materials.teacher_denoiser(all_steps)
        return ScoreDifference(real, fake, fake.levels, self.weighting, self.time_range)
