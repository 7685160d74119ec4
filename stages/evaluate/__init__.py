"""Stage kind `evaluate`: samples student and teacher from the same held-out noises, and measures and shows the results.

`stage` holds the settings. `run` calls `noises`, `sides`, `measure` and `page`. Comparisons of several evaluations are
in `stages.reports`, and distances between sets of features in `stages.metrics`.
"""

from stages.evaluate.stage import Evaluate

__all__ = ["Evaluate"]
