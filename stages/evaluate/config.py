"""Settings inside `kind: evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Execution

Split = Literal["test", "validation"]

MIN_SAMPLES = 100
"""Smallest number of images in each of the two sets of a distance. It is larger than the number of a probe's features,
so that covariances are not singular."""


class EvaluationExecution(Execution):
    """How an evaluation is run. These settings are recorded in its artifact, and changing them makes nothing stale."""

    micro_batch: int = Field(
        64, ge=1, description="number of samples drawn at once; seconds per image are measured in batches of this size"
    )
