"""Commands that plan and run pipelines: `retort submit`, `resume` and `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.cluster import Cluster, cluster_options, run_on
from pipeline.commands.console import (
    Execution,
    carry_out,
    dry_run_option,
    execution_options,
    find_run,
    is_manifest,
    json_option,
    name_option,
    open_store,
    plan_run,
    print_result,
    selection_options,
    set_option,
    show_plan,
    store_option,
    store_override,
)
from pipeline.reference.completion import complete_runs, complete_runs_or_paths, complete_stages

if TYPE_CHECKING:
    from pipeline.planning import Selection


@click.command(short_help="Run the pipeline of a manifest.")
@click.argument("manifest", type=click.Path(path_type=Path))
@set_option
@selection_options
@dry_run_option
@name_option
@store_option
@execution_options
@cluster_options
def submit(
    manifest: Path,
    overrides: tuple[str, ...],
    selection: Selection,
    dry_run: bool,
    name: str | None,
    store: str | None,
    how: Execution,
    cluster: Cluster | None,
) -> None:
    """Run the pipeline of MANIFEST. Artifacts that the store already holds are reused."""
    from pipeline.manifest import examine

    loaded = examine(manifest, [*overrides, *store_override(store)])
    run_name = name or loaded.manifest.name
    if dry_run:
        show_plan(loaded, run_name, selection, how.as_json)
    elif cluster:
        run_on(cluster, loaded, run_name, selection, how)
    else:
        carry_out(loaded, run_name, selection, how)


def _same_build(_: click.Context, __: click.Parameter, theirs: str | None) -> None:
    from pipeline.engines.nodes import build_difference
    from pipeline.errors import UsageError

    if theirs and (problem := build_difference("this node", "the machine that submitted the run", theirs)):
        raise UsageError(problem)


@click.command(short_help="Continue a run.")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@click.argument("stages", metavar="[STAGE]...", nargs=-1, shell_complete=complete_stages)
@selection_options
@dry_run_option
@store_option
@execution_options
@cluster_options
@click.option("--submitted-by", metavar="BUILD", hidden=True, expose_value=False, callback=_same_build)
def resume(
    run_name: str | None,
    stages: tuple[str, ...],
    selection: Selection,
    dry_run: bool,
    store: str | None,
    how: Execution,
    cluster: Cluster | None,
) -> None:
    """Continue RUN, or only some STAGEs of it. Finished work is not repeated."""
    run = find_run(run_name, store)
    selection = replace(selection, only=(*stages, *selection.only))
    if dry_run:
        show_plan(run.manifest(), run.name, selection, how.as_json)
    elif cluster:
        run_on(cluster, run.manifest(), run.name, selection, how, follow=True)
    else:
        carry_out(run.manifest(), run.name, selection, how)


@click.command(short_help="Show what would be done, and why.")
@click.argument("target", metavar="MANIFEST|RUN", shell_complete=complete_runs_or_paths)
@set_option
@selection_options
@click.option(
    "--diff",
    metavar="RUN",
    shell_complete=complete_runs,
    help="Show instead how the settings differ from those of this run.",
)
@name_option
@store_option
@json_option
def plan(
    target: str,
    overrides: tuple[str, ...],
    selection: Selection,
    diff: str | None,
    name: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Show what `retort submit MANIFEST` or `retort resume RUN` would do, and why. Nothing is changed."""
    from pipeline.manifest import examine
    from pipeline.planning.difference import difference
    from pipeline.runs import Run
    from pipeline.views import tables

    if is_manifest(target):
        loaded = examine(Path(target), [*overrides, *store_override(store)])
        run_name = name or loaded.manifest.name
    elif name is not None:
        raise click.UsageError("--name needs a manifest; a run already has a name")
    else:
        run = find_run(target, store)
        loaded, run_name = run.manifest(overrides), run.name
    if diff is None:
        show_plan(loaded, run_name, selection, as_json)
        return
    if selection.given or selection.force:
        raise click.UsageError("--diff compares whole plans; do not give --only, --from or --force")
    before = Run.find(open_store(loaded.manifest.store), diff).plan()
    now = plan_run(loaded, Run(open_store(loaded.manifest.store), loaded.manifest.name))
    found = difference(before, {stage.name: stage.as_dict() for stage in now})
    print_result(as_json, found, lambda: tables.difference(found))
