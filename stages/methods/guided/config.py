from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from stages.diffusion.form import Form, WRange
from stages.methods.base import Materials, Method, MethodConfig
from stages.methods.halving import HalvingConfig


class GuidedConfig(HalvingConfig):
    """Distillation of guided diffusion models (Meng et al. 2023, 2210.03142), in two stages that make one chain.

    The first link learns, in as many steps, what the teacher puts out under guidance, for every strength w of a range;
    the others halve its steps, with w drawn for each sample. One student serves every w. The paper's w counts from 0,
    plain conditional output; diffusers' guidance_scale is w + 1, and its pipelines feed the network guidance_scale - 1.

    A stage with `start_from`, a student for the same w, has no first link: it goes on halving.
    """

    name: Literal["guided"] = "guided"
    w_range: WRange = Field(
        (0.0, 4.0), description="the least and the greatest w that the student learns; guidance_scale - 1"
    )
    sampler: Literal["ddim", "stochastic"] = Field(
        "ddim",
        description="how the student is sampled: deterministically, or by a step of twice the length and noise for one "
        "back, which is Retort's own and not in diffusers",
    )

    @classmethod
    def halvings(cls, start: int, end: int, goes_on: bool) -> list[tuple[int, int]]:
        found = super().halvings(start, end, goes_on)
        learns = (start, start)
        return found if goes_on or (not found and start != end) else [learns, *found]

    @property
    def form(self) -> Form:
        return super().form.model_copy(update={"sampler": self.sampler, "w_range": self.w_range})

    def check_start(self, start: MethodConfig | None) -> Iterator[tuple[str, str]]:
        yield from super().check_start(start)
        if start is None and self.halves:
            yield "start_steps", "a student that takes w is needed to go on from; start_from names none"
        if start is not None and not self.halves:
            yield "start_steps", "guidance is learned from the teacher itself; leave start_from out"

    def create(self, materials: Materials) -> Method:
        from stages.methods.guided.method import Guided

        return Guided(self, materials)
