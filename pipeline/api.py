"""Retort from Python: plan and run manifests in this process, and open what they made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.commands.console import Execution, carry_out, find_artifact, plan_run
from pipeline.manifest import examine, load
from pipeline.planning import Plan, Selection
from pipeline.runs import Run
from pipeline.store import Store, load_artifact
from stages.base import Artifact


def plan(manifest: Path | str, settings: Sequence[str] = ()) -> Plan:
    """Return the planned stages of a manifest, in the order in which they would run. Nothing is changed.

    `settings` are written as for `--set`: "stages.pairs.count=64". Raises ManifestError for an invalid manifest."""
    loaded = load(Path(manifest), settings)
    return plan_run(loaded, Run(Store(loaded.manifest.store), loaded.manifest.name))


def submit(
    manifest: Path | str,
    settings: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    engine: Literal["inline", "ray"] = "inline",
    quiet: bool = False,
) -> dict[str, Artifact]:
    """Run a manifest as `retort submit` does, and return a mapping from stage to artifact.

    Sealed artifacts are reused. `settings` are written as for `--set`. With `only`, only these stages are made. The
    engine inline computes in this process, and ray in workers. Raises ManifestError for an invalid manifest, and
    StageFailed if a stage fails."""
    loaded = examine(Path(manifest), settings)
    chosen, how = Selection(tuple(only), (), ()), Execution(engine, quiet=quiet)
    return {stage.name: stage.artifact for stage in carry_out(loaded, loaded.manifest.name, chosen, how)}


def artifact(target: str, store: str | None = None) -> Artifact:
    """Return a sealed artifact, given as RUN/STAGE or as the path of its folder.

    The store is ./retort-store by default. Raises UsageError if there is no such artifact."""
    return load_artifact(find_artifact(target, store))
