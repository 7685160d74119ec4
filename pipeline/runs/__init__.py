"""Runs: the folder of a run, the runner that carries out its plan, and commands on runs.

Status, history, repair, verification, forcing and garbage collection are here. Printing is in `pipeline.views`. Jobs of
a Ray cluster are in `pipeline.jobs`.
"""

from pipeline.runs.run import Run, all_runs
from pipeline.runs.runner import Reporter, Runner
from pipeline.runs.status import status_of

__all__ = ["Reporter", "Run", "Runner", "all_runs", "status_of"]
