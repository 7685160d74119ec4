"""Prediction types of a denoiser, and the conversions between them.

All formulas follow from z = alpha x0 + sigma noise, alpha^2 + sigma^2 = 1 and v = alpha noise - sigma x0
(Salimans and Ho 2022, 2202.00512, appendix D).
"""

from __future__ import annotations

from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a network predicts, in diffusers' words: the noise, v, or x0."""

StudentPrediction = Literal["v_prediction", "epsilon", "sample", "both"]
"""As Prediction. `both` means x0 and the noise, concatenated along the channels. diffusers does not support it."""

Array = Any
"""A torch.Tensor or a numpy.ndarray. alpha and sigma are floats, or arrays that broadcast against it."""


def to_x0(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Convert a network's `output` at `z` to its estimate of x0. All arrays have the same shape.

    epsilon: x0 = (z - sigma output) / alpha, where alpha must not be 0. v: x0 = alpha z - sigma output.
    sample: x0 = output."""
    if prediction == "epsilon":
        return (z - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * z - sigma * output
    return output


def both_to_x0(x0: Array, noise: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Combine the two estimates of a network that predicts both: sigma^2 x0 + alpha (z - sigma noise).

    Each estimate has more weight where it is more accurate (2202.00512, section 4)."""
    return sigma**2 * x0 + alpha * (z - sigma * noise)


def to_noise(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """Convert a network's `output` at `z` to its estimate of the noise. All arrays have the same shape.

    epsilon: noise = output. v: noise = sigma z + alpha output. sample: noise = (z - alpha output) / sigma, where sigma
    must not be 0."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return sigma * z + alpha * output
    return (z - alpha * output) / sigma


def target(prediction: Prediction, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """The output that a network should give at z = alpha x0 + sigma noise.

    epsilon: noise. v: alpha noise - sigma x0. sample: x0."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return alpha * noise - sigma * x0
    return x0
