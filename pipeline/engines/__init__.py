"""Engines give a stage its workers: in this process (`inline`), or on Ray, embedded or attached to a cluster (`ray`).

Both follow the protocol in `engine`. Only `ray` and `pipeline.jobs` import Ray. Engines know nothing of runs or stores.
"""

from pipeline.engines.engine import Engine, Failure, WorkerShape, describe
from pipeline.engines.inline import InlineEngine

__all__ = ["Engine", "Failure", "InlineEngine", "WorkerShape", "describe"]
