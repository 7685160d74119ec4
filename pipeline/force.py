"""Forcing: what was made of a stage is to be made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from pipeline.errors import Locked
from pipeline.plan import Plan
from pipeline.runs import Run, live


def forget(run: Run, plan: Plan, waiting: Callable[[str], None] | None) -> None:
    """From now on what was made of the plan's forced stages does not exist, nor do its parts.

    Done for all of them before the first is made: a run that is killed then goes on as any other, without a memory
    of what was forced. Raises Locked if a run that is under way uses one of them.
    """
    for stage in plan:
        if not stage.forced:
            continue
        with run.making(stage.artifact, stage.pool, waiting):
            for other in live(run.store, besides=run):
                if {stage.pool.name, stage.artifact.fingerprint} & other.holds():
                    raise Locked(f"{stage.name} is in use by run {other.name}, under way now; wait for it, or stop it")
            run.store.unseal(stage.artifact)
            shutil.rmtree(run.store.work(stage.artifact), ignore_errors=True)
            shutil.rmtree(stage.pool, ignore_errors=True)
