"""Loss weights by noise level, and their names. Importing it imports neither torch nor NumPy."""

from __future__ import annotations

from typing import Any, Literal

Weighting = Literal["snr", "truncated_snr", "snr_plus_one"]
"""Weights of squared errors of x0, for students."""
FakeWeighting = Literal["output", "snr", "edm"]
"""Weights of squared errors of a fake score: see `FakeScore.errors`."""
ScoreWeighting = Literal["dmd", "constant", "sigma2_over_alpha"]
"""Weights of a difference of scores: see `stages.losses.score.difference`."""
NoiseWeighting = Literal["sigma2", "uniform", "alpha_sigma2"]
"""Weights of a difference of two estimates of the noise: see `noise_weight`."""


def noise_weight(name: NoiseWeighting, alpha: Any, sigma: Any) -> Any:
    """Return the weight of a difference of two estimates of the noise.

    sigma2: sigma^2, that of DreamFusion (Poole et al. 2022, 2209.14988). uniform: 1. alpha_sigma2: alpha sigma^2, which
    threestudio calls fantasia3d."""
    return {"sigma2": sigma**2, "uniform": 1.0, "alpha_sigma2": alpha * sigma**2}[name]


def weights(name: Weighting, alpha: Any, sigma: Any) -> Any:
    """Return the weights of squared errors of x0, shaped as the tensors alpha and sigma. SNR = alpha^2 / sigma^2.
    Source: Salimans and Ho 2022, 2202.00512, section 4.

    With snr (SNR), the weighted error is the squared error of the noise. With snr_plus_one (SNR + 1), it is that of v.
    With truncated_snr (max(SNR, 1)), it is the larger of the errors of x0 and of the noise. sigma must not be 0."""
    snr = (alpha / sigma) ** 2
    return {"snr": snr, "truncated_snr": snr.clip(1.0), "snr_plus_one": snr + 1.0}[name]
