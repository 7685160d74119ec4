"""From a manifest and a store to a plan: which stages are reused, which run, and why.

Planning reads and hashes, and changes nothing. A plan is carried out in `runs`.
"""

from pipeline.planning.content import read_contents
from pipeline.planning.plan import Plan, PlannedStage, make_plan
from pipeline.planning.selection import Selection

__all__ = ["Plan", "PlannedStage", "Selection", "make_plan", "read_contents"]
