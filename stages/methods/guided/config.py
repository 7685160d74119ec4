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
    """Distillation of guided diffusion models (Meng et al. 2023, 2210.03142), in two stages that make one chain.

    The first link learns, in as many steps, what the teacher puts out under guidance, for every strength w of a range;
    the others halve its steps, with w drawn for each sample. One student serves every w. The paper's w counts from 0,
    plain conditional output; diffusers' guidance_scale is w + 1, and its pipelines feed the network guidance_scale - 1.

    A stage with `start_from`, a student for the same w, has no first link: it goes on halving.
    """

    VERSION: ClassVar[int] = 2
    name: Literal["guided"] = "guided"
    match_first: Annotated[Literal[True], Neutral()] = Field(
        True, description="it begins with a link that halves nothing and learns guidance; with start_from it does not"
    )
    w_range: WRange = Field(
        (0.0, 4.0), description="the least and the greatest w that the student learns; guidance_scale - 1"
    )
    sampler: Literal["ddim", "stochastic"] = Field(
        "ddim",
        description="how the student is sampled: deterministically, or by a step of twice the length and noise for one "
        "back, which is Retort's own and not in diffusers",
    )

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"sampler": self.sampler, "w_range": self.w_range})

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        yield from super().check_start(start)
        if start is None and self.halves:
            yield "start_steps", "a student that takes w is needed to go on from; start_from names none"

    def create(self, materials: Materials) -> Method:
        from stages.methods.progressive.method import Progressive

        return Progressive(self, materials)
