"""How much an error in x0 counts at each level of noise (Salimans and Ho 2022, 2202.00512, section 4)."""

from __future__ import annotations

from typing import Any, Literal

Weighting = Literal["snr", "truncated_snr", "snr_plus_one"]


def weights(name: Weighting, alpha: Any, sigma: Any) -> Any:
    """By which squared errors of x0, as tensors of levels, are multiplied. With `snr` they are those of the noise, with
    `snr_plus_one` those of v; `truncated_snr` takes the larger of those of x0 and of the noise."""
    snr = (alpha / sigma) ** 2
    return {"snr": snr, "truncated_snr": snr.clip(1.0), "snr_plus_one": snr + 1.0}[name]
