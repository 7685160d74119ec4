"""Forcing: remove the artifacts, parts and unfinished work of some stages, so that they are made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack

from pipeline.errors import UsageError
from pipeline.planning import Plan
from pipeline.runs.run import Run
from pipeline.store import read_record
from pipeline.store.artifacts import READ_ERRORS


def check(run: Run, plan: Plan, chosen: Collection[str]) -> None:
    """Raise UsageError if forcing would remove files that this command does not make again."""
    forced = [stage for stage in plan if stage.forced]
    unchosen = next((stage for stage in forced if stage.name not in chosen), None)
    if unchosen:
        raise UsageError(
            f"{unchosen.name} would have to be made again, too ({unchosen.why}), but it is not among the chosen "
            f"stages: choose {unchosen.name} too, or choose no stages to carry out all of them"
        )
    folders = {stage.artifact.folder for stage in forced}
    for stage in forced:
        for folder in run.store.root.glob(f"{stage.artifact.kind}/*"):
            try:
                shared = folder not in folders and read_record(folder)["pool"] == stage.pool.name
            except READ_ERRORS:  # no artifact, or a damaged one, which must be made again in any case
                continue
            if shared:
                raise UsageError(
                    f"{stage.name} shares its parts with {folder}: forcing would remove them from both. Force the "
                    "stage of that artifact too, or remove artifacts that no run needs with `retort gc --delete`"
                )


def forget(run: Run, plan: Plan, waiting: Callable[[str], None] | None) -> None:
    """Unseal the artifacts of the plan's forced stages, and remove their unfinished work and their parts.

    All of them are removed before the first is made again, dependants first. A killed run can then be resumed like any
    other: it need not remember what was forced. Raises Locked, before anything changes, if another run uses one of the
    artifacts.
    """
    forced = [stage for stage in plan if stage.forced]
    with ExitStack() as stack:
        for stage in forced:
            stack.enter_context(run.making(stage.artifact, stage.pool, waiting))
        for stage in forced:
            run.check_not_in_use(stage.artifact, stage.pool, stage.name)
        for stage in reversed(forced):
            run.store.unseal(stage.artifact)
            run.store.drop_work(stage.artifact)
            shutil.rmtree(stage.pool, ignore_errors=True)
