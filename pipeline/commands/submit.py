"""Commands that plan and run pipelines: `retort submit`, `resume` and `plan`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands import console
from pipeline.commands.cluster import Cluster, cluster_options, run_on
from pipeline.reference.completion import complete_runs, complete_runs_or_paths, complete_stages

if TYPE_CHECKING:
    from pipeline.planning import Selection


@click.command(short_help="Run the pipeline of a manifest.")
@click.argument("manifest", type=click.Path(path_type=Path))
@console.set_option
@console.selection_options
@console.dry_run_option
@console.name_option
@console.store_option
@console.execution_options
@cluster_options
def submit(
    manifest: Path,
    overrides: tuple[str, ...],
    selection: Selection,
    dry_run: bool,
    name: str | None,
    store: str | None,
    how: console.Execution,
    cluster: Cluster | None,
) -> None:
    """Run the pipeline of MANIFEST. Artifacts that the store already holds are reused."""
    from pipeline.manifest import examine

    loaded = examine(manifest, [*overrides, *console.store_override(store)])
    run_name = name or loaded.manifest.name
    if dry_run:
        console.show_plan(loaded, run_name, selection, how.as_json)
    elif cluster:
        run_on(cluster, loaded, run_name, selection, how)
    else:
        console.carry_out(loaded, run_name, selection, how)


def _same_build(_: click.Context, __: click.Parameter, theirs: str | None) -> None:
    from pipeline.engines.nodes import build_difference
    from pipeline.errors import UsageError

    if theirs and (problem := build_difference("this node", "the machine that submitted the run", theirs)):
        raise UsageError(problem)


@click.command(short_help="Continue a run.")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@click.argument("stages", metavar="[STAGE]...", nargs=-1, shell_complete=complete_stages)
@console.selection_options
@console.dry_run_option
@console.store_option
@console.execution_options
@cluster_options
@click.option("--submitted-by", metavar="BUILD", hidden=True, expose_value=False, callback=_same_build)
def resume(
    run_name: str | None,
    stages: tuple[str, ...],
    selection: Selection,
    dry_run: bool,
    store: str | None,
    how: console.Execution,
    cluster: Cluster | None,
) -> None:
    """Continue RUN, or only some STAGEs of it. Finished work is not repeated."""
    run = console.find_run(run_name, store)
    selection = replace(selection, only=(*stages, *selection.only))
    if dry_run:
        console.show_plan(run.manifest(), run.name, selection, how.as_json)
    elif cluster:
        run_on(cluster, run.manifest(), run.name, selection, how, follow=True)
    else:
        console.carry_out(run.manifest(), run.name, selection, how)


@click.command(short_help="Show what would be done, and why.")
@click.argument("target", metavar="MANIFEST|RUN", shell_complete=complete_runs_or_paths)
@console.set_option
@console.selection_options
@click.option(
    "--diff",
    metavar="RUN",
    shell_complete=complete_runs,
    help="Show instead how the settings differ from those of this run.",
)
@console.name_option
@console.store_option
@console.json_option
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
    from pipeline.planning.fingerprint import difference
    from pipeline.runs import Run
    from pipeline.views import tables

    if console.is_manifest(target):
        loaded = examine(Path(target), [*overrides, *console.store_override(store)])
        run_name = name or loaded.manifest.name
    elif name is not None:
        raise click.UsageError("--name needs a manifest; a run already has a name")
    else:
        run = console.find_run(target, store)
        loaded, run_name = run.manifest(overrides), run.name
    if diff is None:
        console.show_plan(loaded, run_name, selection, as_json)
        return
    if selection.given or selection.force:
        raise click.UsageError("--diff compares whole plans; do not give --only, --from or --force")
    before = Run.find(console.open_store(loaded.manifest.store), diff).plan()
    now = console.plan_run(loaded, Run(console.open_store(loaded.manifest.store), loaded.manifest.name))
    found = difference(before, {stage.name: stage.as_dict() for stage in now})
    console.print_result(as_json, found, lambda: tables.difference(found))
