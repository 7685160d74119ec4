"""The boundary of consistency functions, as diffusers' LCMScheduler has it."""

from __future__ import annotations

from stages.diffusion.prediction import Array

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def boundary(timestep: Array) -> tuple[Array, Array]:
    """(c_skip, c_out) of f = c_skip z + c_out x0, the identity at timestep 0 (Song et al. 2023, 2303.01469, eq. 5, with
    the time scaling of Luo et al. 2023, 2310.04378)."""
    scaled = TIMESTEP_SCALING * timestep
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total**0.5
