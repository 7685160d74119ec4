"""Planning decides which stages of a manifest are reused and which are run, and gives the reasons.

Planning reads and hashes files. It makes no artifact and no run. `pipeline.runs` carries plans out.
"""

from pipeline.planning.content import read_contents
from pipeline.planning.plan import Plan, PlannedStage, make_plan
from pipeline.planning.selection import Selection

__all__ = ["Plan", "PlannedStage", "Selection", "make_plan", "read_contents"]
