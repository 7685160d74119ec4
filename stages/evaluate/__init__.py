"""Stage kind `evaluate`: student and teacher sampled from the same held-out noises, measured and drawn.

`stage` holds its settings; `run` goes through `noises`, `sides`, `measure` and `page`. Comparisons of several
evaluations are in `stages.reports`, distances between sets of features in `stages.metrics`.
"""

from stages.evaluate.stage import Evaluate

__all__ = ["Evaluate"]
