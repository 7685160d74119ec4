"""Runs: the folder of a run, the runner that carries out its plan, and what commands do with runs.

`status`, `history`, `repair`, `force` (making stages again) and `garbage` (removing unused artifacts) each serve a
command. `pipeline.views` prints the results. `pipeline.jobs` runs jobs on a Ray cluster.
"""

from pipeline.runs.run import Run, all_runs
from pipeline.runs.runner import Reporter, Runner
from pipeline.runs.status import status_of

__all__ = ["Reporter", "Run", "Runner", "all_runs", "status_of"]
