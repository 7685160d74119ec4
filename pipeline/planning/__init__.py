"""Planning: which stages of a manifest are reused, which run, and why.

Planning reads and hashes files. It makes no artifact and no run. Plans are carried out by `pipeline.runs`.
"""

from pipeline.planning.content import read_contents
from pipeline.planning.plan import Plan, PlannedStage, make_plan
from pipeline.planning.selection import Selection

__all__ = ["Plan", "PlannedStage", "Selection", "make_plan", "read_contents"]
