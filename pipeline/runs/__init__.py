"""A run: its folder, the runner that carries out its plan, and what is done to it afterwards.

Status, history, repair, verification, forcing and garbage collection are here. How a run is shown to a person is in
`views`, how it becomes a job of a Ray cluster in `jobs`.
"""

from pipeline.runs.run import Run, all_runs
from pipeline.runs.runner import Reporter, Runner
from pipeline.runs.status import status_of

__all__ = ["Reporter", "Run", "Runner", "all_runs", "status_of"]
