"""Stage kind `evaluate`: samples a student and its teacher from the same held-out noises, and compares the images.

`stage` holds the settings. `run` carries the evaluation out: `noises` chooses the noises, `sides` samples the student
and the teacher, `measure` computes metrics, and `page` writes an HTML page. `stages.reports` compares several
evaluations. `stages.metrics` computes distances between sets of features.
"""

from stages.evaluate.stage import Evaluate

__all__ = ["Evaluate"]
