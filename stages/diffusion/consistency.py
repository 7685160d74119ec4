"""The boundary condition of consistency models, with the constants of diffusers' LCMScheduler."""

from __future__ import annotations

from stages.diffusion.prediction import Array

SIGMA_DATA = 0.5
"""The assumed standard deviation of the data: sigma_data in the paper."""
TIMESTEP_SCALING = 10.0
"""The factor s by which timesteps are scaled."""


def boundary(timestep: Array) -> tuple[Array, Array]:
    """Return (c_skip, c_out) of the consistency function f(z, t) = c_skip(t) z + c_out(t) x0(z, t), shaped as t.

    c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2) and c_out = s t / sqrt((s t)^2 + sigma_data^2) (Song et al. 2023,
    2303.01469, eq. 5). f is the identity at t = 0. s is the timestep scaling of diffusers' LCM (Luo et al. 2023,
    2310.04378)."""
    scaled = TIMESTEP_SCALING * timestep
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total**0.5
