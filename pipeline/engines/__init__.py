"""Engines run the work of a stage: in this process (`inline`), or on Ray (`ray`), in a local Ray or on a cluster.

Both follow the protocol in `engine`. Only `ray` and `pipeline.jobs` import Ray. Engines know nothing of runs or of the
store.
"""

from pipeline.engines.engine import Engine, Failure, WorkerShape, describe
from pipeline.engines.inline import InlineEngine

__all__ = ["Engine", "Failure", "InlineEngine", "WorkerShape", "describe"]
