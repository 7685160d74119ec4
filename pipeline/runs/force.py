"""Forcing: what was made of a stage is to be made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.planning import Plan, PlannedStage
from pipeline.runs.run import Run
from pipeline.store import read_record
from pipeline.store.artifacts import READ_ERRORS


def check(run: Run, plan: Plan, chosen: Collection[str]) -> None:
    """Raise UsageError if forcing would take away what is not made again by the same command."""
    forced = [stage for stage in plan if stage.forced]
    left = next((stage for stage in forced if stage.name not in chosen), None)
    if left:
        raise UsageError(
            f"{left.name} would have to be made again, too ({left.why}), and is not among the chosen stages: "
            "choose it, or leave the choice of stages away"
        )
    folders = {stage.artifact.folder for stage in forced}
    for stage in forced:
        others = [folder for folder in _sharers(run, stage) if folder not in folders]
        if others:
            raise UsageError(
                f"the parts of {stage.name} are also those of {others[0]}: forcing would take them away from it. "
                "Force a stage for each of them, or remove what no run needs with `retort gc`"
            )


def _sharers(run: Run, stage: PlannedStage) -> Iterator[Path]:
    """Folders of artifacts whose parts lie in the stage's pool."""
    for folder in run.store.root.glob(f"{stage.artifact.kind}/*"):
        try:
            if read_record(folder)["pool"] == stage.pool.name:
                yield folder
        except READ_ERRORS:  # no artifact, or a damaged one, which has to be made again anyhow
            continue


def forget(run: Run, plan: Plan, waiting: Callable[[str], None] | None) -> None:
    """From now on what was made of the plan's forced stages does not exist, nor do its parts.

    Done for all of them, dependants first, before the first is made: a run that is killed then goes on as any other,
    without a memory of what was forced. Raises Locked, before anything is changed, if another run uses one of them.
    """
    forced = [stage for stage in plan if stage.forced]
    with ExitStack() as stack:
        for stage in forced:
            stack.enter_context(run.making(stage.artifact, stage.pool, waiting))
        for stage in forced:
            run.refuse_others(stage.artifact, stage.pool, stage.name)
        for stage in reversed(forced):
            run.store.unseal(stage.artifact)
            run.store.drop_work(stage.artifact)
            shutil.rmtree(stage.pool, ignore_errors=True)
