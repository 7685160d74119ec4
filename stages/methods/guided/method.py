from __future__ import annotations

from torch import Tensor

from stages.methods.progressive.method import Progressive


class Guided(Progressive):
    """A link of Meng et al. 2023, 2210.03142: minimise w(lambda_t) |x~ - x^(z_t, w)|^2, w drawn evenly from the range
    for each sample.

    Stage one (section 3.1): x~ = (1 + w) x_c(z_t) - w x_0(z_t), what the teacher makes of z_t with and without its
    prompt. Stage two (section 3.2): one step with x~ leads where two of the student before do, at the same w."""

    def target(self, z: Tensor, i: Tensor, condition: Tensor | None, w: Tensor | None) -> Tensor:
        if self.config.halves:
            return super().target(z, i, condition, w)
        return self.teacher.x0(z, i, condition, w).double()
