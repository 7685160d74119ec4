"""Returns the sample of a few-step student, without the intermediate states."""

from torch import Tensor

from stages.diffusion.few_step import states


def sample(*arguments) -> Tensor:
    """The last x0 of `states`."""
    *_, (_, _, x0) = states(*arguments)
    return x0
