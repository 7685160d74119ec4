"""Prediction types of a denoiser, and the conversions between them.

z = alpha x0 + sigma noise, for any alpha and sigma: variance preserving schedules have alpha^2 + sigma^2 = 1, flow
schedules alpha + sigma = 1. v = alpha noise - sigma x0 (Salimans and Ho 2022, 2202.00512, appendix D), and
u = noise - x0 (Lipman et al. 2023, 2210.02747, with time from data to noise).
"""

from __future__ import annotations

from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""The prediction type of a network, named as in diffusers: the noise, v, x0 or u, in this order."""

StudentPrediction = Literal["v_prediction", "epsilon", "sample", "flow_prediction", "both"]
"""As Prediction. `both` means x0 and the noise, concatenated along the channels. diffusers does not support it."""

Array = Any
"""A torch.Tensor or a numpy.ndarray. alpha and sigma are floats, or arrays that broadcast against it."""

ROUNDING = {"float64": 1e-15, "float32": 5e-7, "float16": 4e-3, "bfloat16": 3e-2}
"""By dtype, the tolerance within which alpha^2 + sigma^2 counts as 1: about four units in the last place."""


def power(alpha: Any, sigma: Any) -> Any:
    """Return alpha^2 + sigma^2, or exactly 1 where it differs from 1 only by rounding.

    Dividing by 1 is exact. So for variance preserving schedules, formulas that divide by this power give the same bits
    as formulas without the division."""
    found = alpha**2 + sigma**2
    off = abs(found - 1.0)
    tolerance = ROUNDING[str(getattr(found, "dtype", "float64")).removeprefix("torch.")]
    return found + (off <= tolerance) * (1.0 - found)


def to_x0(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Convert a network's `output` at `z` to its estimate of x0. All arrays have the same shape.

    epsilon: x0 = (z - sigma output) / alpha, where alpha must not be 0. v: x0 = (alpha z - sigma output) / (alpha^2 +
    sigma^2). sample: x0 = output. flow: x0 = (z - sigma output) / (alpha + sigma)."""
    if prediction == "epsilon":
        return (z - sigma * output) / alpha
    if prediction == "v_prediction":
        return (alpha * z - sigma * output) / power(alpha, sigma)
    if prediction == "flow_prediction":
        return (z - sigma * output) / (alpha + sigma)
    return output


def both_to_x0(x0: Array, noise: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Combine the two estimates of a network that predicts both: (sigma^2 x0 + alpha (z - sigma noise)) / (alpha^2 +
    sigma^2).

    Each estimate has more weight where it is more accurate (2202.00512, section 4)."""
    return (sigma**2 * x0 + alpha * (z - sigma * noise)) / power(alpha, sigma)


def to_noise(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Convert a network's `output` at `z` to its estimate of the noise. All arrays have the same shape.

    epsilon: noise = output. v: noise = (sigma z + alpha output) / (alpha^2 + sigma^2). sample: noise = (z - alpha
    output) / sigma, where sigma must not be 0. flow: noise = (z + alpha output) / (alpha + sigma)."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return (sigma * z + alpha * output) / power(alpha, sigma)
    if prediction == "flow_prediction":
        return (z + alpha * output) / (alpha + sigma)
    return (z - alpha * output) / sigma


def target(prediction: Prediction, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """Return the training target: the output of a perfect network at z = alpha x0 + sigma noise.

    epsilon: noise. v: alpha noise - sigma x0. sample: x0. flow: noise - x0."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return alpha * noise - sigma * x0
    if prediction == "flow_prediction":
        return noise - x0
    return x0
