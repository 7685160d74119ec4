from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.base import Artifact, Choice, values_under
from stages.diffusion.config import Scale, in_words
from stages.diffusion.form import Form
from stages.losses.config import LOSSES, LossConfig, Regression
from stages.methods.base import Materials, Stream
from stages.methods.matching import MatchingConfig
from stages.training import Method


class DMDConfig(MatchingConfig):
    """Distribution matching distillation (DMD, Yin et al. 2023, 2311.18828) into one step.

    The student's samples move along the difference of two scores: that of the teacher, and that of a network trained on
    the samples. A regression on stored pairs keeps the student from dropping modes of the teacher. Without `prompts`,
    the student samples from the prompts of the pairs.

    In the paper, the regression loss is LPIPS between decoded images, and the pairs have the guidance scale of the real
    score.
    """

    DATA: ClassVar[tuple[frozenset[Stream], ...]] = (
        frozenset({"pairs"}),
        frozenset({"pairs", "prompts"}),
        frozenset({"prompts"}),
    )
    LEARNS_RANGE: ClassVar[bool] = True
    name: Literal["dmd"] = "dmd"
    regression_weight: float = Field(
        0.25, ge=0, description="weight of the regression on stored pairs; 0: no regression, and no pairs are needed"
    )
    loss: Annotated[LossConfig, Choice("name", LOSSES, default="e_latent_lpips")] = Field(
        Regression(name="mse"),
        description="distance of the regression; without a name, as in {perceptual: STAGE}, it is e_latent_lpips",
    )

    @property
    def form(self) -> Form:
        return Form(prediction=None, guidance_scale=self.guidance_scale)

    @property
    def learns_pairs(self) -> bool:
        return self.regression_weight > 0

    def check(self, inputs: Mapping[str, Artifact]) -> Iterator[tuple[str, str]]:
        yield from ((f"loss.{path}", problem) for path, problem in self.loss.check(values_under(inputs, "loss")))

    def check_training(self, streams: Collection[Stream], steps: int) -> Iterator[tuple[str, str]]:
        if self.regression_weight and "pairs" not in streams:
            yield "regression_weight", "the regression needs `pairs`; give them, or set regression_weight: 0"
        if not self.regression_weight and "pairs" in streams:
            yield "regression_weight", "without a regression, `pairs` are not used; give `prompts` instead"

    def warnings(self, pairs_scales: Sequence[Scale]) -> Iterator[str]:
        for scale in pairs_scales:
            if self.guidance_scale not in (None, scale):
                yield (
                    f"the real score has guidance_scale: {self.guidance_scale:g}, but the pairs of the regression have "
                    f"{in_words(scale)}; the two loss terms lead to different images"
                )

    def create(self, materials: Materials) -> Method:
        from stages.methods.dmd.method import DMD

        return DMD(self, materials)
