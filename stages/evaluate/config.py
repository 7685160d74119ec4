"""Settings inside `kind: evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.base import Execution

Split = Literal["test", "validation"]

MIN_SAMPLES = 100
"""In each set of images that distances are measured between: more than a probe has features, or covariances are
singular."""


class EvaluationExecution(Execution):
    """How an evaluation is carried out. Recorded in what it makes, and never a reason to make it again."""

    micro_batch: int = Field(
        64, ge=1, description="samples drawn at once; the seconds for an image are measured in such batches"
    )
