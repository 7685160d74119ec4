from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from stages.base import Config
from stages.diffusion.form import Form
from stages.methods.base import Materials, MethodConfig, Stream, form_mismatches
from stages.methods.matching import MatchingConfig
from stages.training import Method


class GanSettings(Config):
    """The GAN term: a head on the fake score's middle block distinguishes noised real latents from noised samples.

    The papers' weights suit their resolutions only, because the loss of distribution matching is a mean over elements.
    The logged figure `gan_ratio` is the norm of the GAN gradient at the samples, relative to that of distribution
    matching."""

    weight: float = Field(
        3e-3, gt=0, description="weight in the student's loss; DMD2: 3e-3 (ImageNet-64), 1e-3 (SD 1.5), 5e-3 (SDXL)"
    )
    discriminator_weight: float = Field(
        1e-2,
        gt=0,
        description="weight of the head's loss in the fake score's loss; a large weight harms the fake score, because "
        "the head shares its network",
    )


class DMD2Config(MatchingConfig):
    """DMD2 (Yin et al. 2024, 2405.14867): distribution matching in one or several steps, without pairs.

    The fake score is trained at every step, and the student at every `fake_updates`-th step. `training.steps` counts
    the steps of the fake score. The real latents are those of the stage in `latents`. Without `prompts`, the student
    samples from the captions of the latents.

    A student of several steps is trained on the states that its own sampling visits, up to a random step (backward
    simulation, section 4.5). It is sampled by the consistency sampler, which diffusers calls LCM.
    """

    DATA: ClassVar[tuple[frozenset[Stream], ...]] = (
        frozenset({"latents"}),
        frozenset({"latents", "prompts"}),
        frozenset({"prompts"}),
    )
    name: Literal["dmd2"] = "dmd2"
    steps: int = Field(1, ge=1, description="sampling steps of the student")
    levels: tuple[int, ...] | None = Field(
        None,
        strict=False,
        description="timesteps at which the student is called, descending, such as [399] for SDXL in one step; "
        "default: evenly spaced from the noisiest, such as [999, 749, 499, 249] in 4 steps",
    )
    backward_simulation: bool = Field(
        True,
        description="whether sampling steps after the first are trained on the student's own states; if false, they "
        "are trained on noised real latents, which sampling does not visit",
    )
    fake_updates: int = Field(
        5, ge=1, description="steps of the fake score for each step of the student; DMD2: 5, and 10 for SD 1.5"
    )
    fake_warmup_steps: int = Field(
        0, ge=0, description="number of first steps in which only the fake score is trained; useful with start_from"
    )
    gan: GanSettings | None = Field(
        GanSettings(), description="the GAN term, which needs latents; on by default; null: none"
    )

    @property
    def form(self) -> Form:
        return Form(
            steps=self.steps,
            levels=self.levels,
            prediction=None,
            sampler="consistency",
            boundary="none",
            guidance_scale=self.guidance_scale,
        )

    @model_validator(mode="after")
    def _has_a_form(self) -> Self:
        try:
            _ = self.form
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    @property
    def has_discriminator(self) -> bool:
        return self.gan is not None

    def check_timesteps(self, count: int) -> Iterator[tuple[str, str]]:
        if self.levels and self.levels[0] >= count:
            yield "levels", f"{self.levels[0]} is not one of the teacher's {count} timesteps, 0 to {count - 1}"
        elif self.steps > count:
            yield "steps", f"{self.steps} are more than the teacher's {count} timesteps"

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        if start is not None:  # in one step, all samplers are the same
            yield from form_mismatches(start.form, self.form, ignore=("sampler",) if self.steps == 1 else ())

    def check_training(self, streams: Collection[Stream], steps: int) -> Iterator[tuple[str, str]]:
        if self.fake_warmup_steps >= steps:
            yield "fake_warmup_steps", f"the student has no turn in {steps} training steps: lower it"
        if self.gan and "latents" not in streams:
            yield "gan", "the GAN term compares with real images: give `latents`, or set gan: null"
        if self.backward_simulation:
            return
        if self.steps == 1:
            yield "backward_simulation", "in one step there is nothing to simulate: leave it out"
        if set(streams) != {"latents"}:
            yield "backward_simulation", "without it, real latents are noised: give `latents`, and no prompts"

    def create(self, materials: Materials) -> Method:
        from stages.methods.dmd2.method import DMD2

        return DMD2(self, materials)
