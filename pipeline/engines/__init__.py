"""Engines run the work of a stage, either in this process (`inline`) or on a local or remote Ray cluster (`ray`).

Both implement the protocol in `engine`. Only `ray` imports Ray. Engines do not use runs or the store.
"""

from pipeline.engines.engine import Engine, Failure, WorkerShape, describe
from pipeline.engines.inline import InlineEngine

__all__ = ["Engine", "Failure", "InlineEngine", "WorkerShape", "describe"]
