"""The three things a denoiser may predict, and the one place that converts between them.

All formulas follow from z = alpha x0 + sigma noise, alpha^2 + sigma^2 = 1, v = alpha noise - sigma x0
(Salimans and Ho 2022, 2202.00512, appendix D).
"""

from __future__ import annotations

from typing import Any, Literal

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a network's output means, in diffusers' words: the noise, v, or x0."""

StudentPrediction = Literal["v_prediction", "epsilon", "sample", "both"]
"""`both`: x0 and the noise, one after the other along the channels. diffusers has no word and no use for it."""

Array = Any
"""A torch.Tensor or a numpy.ndarray; alpha and sigma are floats or broadcast against it."""


def to_x0(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """x0 as estimated by a network's `output` at `z`. Epsilon divides by alpha, which must not be 0."""
    if prediction == "epsilon":
        return (z - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * z - sigma * output
    return output


def both_to_x0(x0: Array, noise: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """x0 of a network that estimates both: each where it is good (2202.00512, section 4)."""
    return sigma**2 * x0 + alpha * (z - sigma * noise)


def to_noise(prediction: Prediction, output: Array, z: Array, alpha: Any, sigma: Any) -> Array:
    """The noise as estimated by a network's `output` at `z`. `sample` divides by sigma, which must not be 0."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return sigma * z + alpha * output
    return (z - alpha * output) / sigma


def target(prediction: Prediction, x0: Array, noise: Array, alpha: Any, sigma: Any) -> Array:
    """What a network that predicts `prediction` should put out at z = alpha x0 + sigma noise."""
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return alpha * noise - sigma * x0
    return x0
