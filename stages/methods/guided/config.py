from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.base import Neutral
from stages.diffusion.form import Form, WRange
from stages.methods.base import Materials, MethodConfig
from stages.methods.halving import HalvingConfig
from stages.training import Method


class GuidedConfig(HalvingConfig):
    """Distillation of guided diffusion models (Meng et al. 2023, 2210.03142): one student for all guidance strengths.

    The first link of the chain learns the teacher's guided output for every strength w of `w_range`, in `start_steps`
    steps. The other links halve the steps, as in progressive distillation. w is drawn for each sample and is an input
    of the student. w = 0 gives the conditional output without guidance. In diffusers, guidance_scale is w + 1, and
    pipelines pass guidance_scale - 1 to the network.

    If `start_from` names a student with the same `w_range`, the chain omits its first link and only halves the steps.
    """

    VERSION: ClassVar[int] = 2
    name: Literal["guided"] = "guided"
    match_first: Annotated[Literal[True], Neutral()] = Field(
        True,
        description="always true: the first link learns guidance and keeps start_steps steps; ignored with start_from",
    )
    w_range: WRange = Field((0.0, 4.0), description="range of w = guidance_scale - 1 that the student learns")
    sampler: Literal["ddim", "stochastic"] = Field(
        "ddim",
        description="how the student is sampled; ddim: without new noise; stochastic: a DDIM step of twice the length, "
        "then noise that leads one step back (2210.03142, section 3.3); diffusers cannot run it",
    )

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"sampler": self.sampler, "w_range": self.w_range})

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        yield from super().check_start(start)
        if start is None and self.halves:
            yield "start_steps", "this round needs a student that takes w; name one in start_from"

    def create(self, materials: Materials) -> Method:
        from stages.methods.progressive.method import Progressive

        return Progressive(self, materials)
