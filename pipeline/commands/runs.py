"""Commands that show runs and clean up: `retort runs`, `status`, `logs` and `gc`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from pipeline.commands.console import find_run, json_option, open_store, print_result, say_waiting, store_option
from pipeline.reference.completion import complete_runs, complete_runs_or_paths, complete_stages


@click.command(short_help="List the runs of the store.")
@store_option
@json_option
def runs(store: str | None, as_json: bool) -> None:
    """List the runs of the store."""
    from pipeline.runs.status import runs_of
    from pipeline.views import tables

    found = runs_of(opened := open_store(store))
    print_result(as_json, found, lambda: tables.runs(str(opened.root), found))


@click.command(short_help="Show the progress of a run's stages.")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@click.option("--watch", is_flag=True, help="Update the display until the run ends.")
@store_option
@json_option
def status(run_name: str | None, watch: bool, store: str | None, as_json: bool) -> None:
    """Show the progress, speed and cost of each stage of RUN, and the path of its artifact."""
    from pipeline.runs import status_of
    from pipeline.views import tables
    from pipeline.views.watch import watch as follow

    run = find_run(run_name, store)
    table = partial(tables.status, run.name, str(run.store.root))
    if watch and as_json:
        raise click.UsageError("--watch is for people; programs follow `retort logs RUN -f --json`")
    if watch:
        follow(run, lambda: table(status_of(run)))
    else:
        stages = status_of(run)
        print_result(as_json, {"run": run.name, "stages": stages}, lambda: table(stages))


@click.command(short_help="Print or follow a stage's log.")
@click.argument("run_name", metavar="RUN", shell_complete=complete_runs_or_paths)
@click.argument("stage", required=False, shell_complete=complete_stages)
@click.option("--follow", "-f", is_flag=True, help="Continue until the run ends.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's events instead, one JSON object on each line.")
@store_option
def logs(run_name: str, stage: str | None, follow: bool, as_json: bool, store: str | None) -> None:
    """Print the log of a STAGE of RUN. Without STAGE, print the events of the run."""
    from pipeline.errors import UsageError
    from pipeline.manifest.matrix import chosen
    from pipeline.runs.run import read_event
    from pipeline.views.watch import lines

    run = find_run(run_name, store)
    plan = run.plan()
    names = chosen(list(plan), stage) if stage else []
    if stage and not names:
        raise UsageError(f"no stage {stage!r}; run {run.name} has: {', '.join(plan)}")
    if stage and not as_json:
        if follow and len(names) > 1:
            raise UsageError(f"{stage} is {len(names)} stages; to follow, name one: {', '.join(names)}")
        for name in names:
            if len(names) > 1:
                click.echo(f"==> {name} <==")
            for line in lines(run.log_file(name), run, follow):
                click.echo(line)
    else:
        for line in lines(run.folder / "events.jsonl", run, follow):
            event = read_event(line)
            if event and (not stage or event["stage"] in names):
                click.echo(line if as_json else _words(event))


def _words(event: dict[str, Any]) -> str:
    from pipeline.views.progress import describe
    from stages.base import Progress

    if event["event"] == "progress":
        text = describe(Progress(event["done"], event["total"], event["unit"]))
    else:
        detail = event.get("error") or event.get("why") or ""
        text = event["event"].replace("_", " ") + (f": {detail}" if detail else "")
    return f"{event['time'][:19]}  {event['stage'] or 'run'}: {text}"


@click.command(short_help="Show or delete artifacts that no run uses.")
@click.option("--delete", is_flag=True, help="Delete what is listed. Without this option, nothing is changed.")
@click.option(
    "--drop",
    multiple=True,
    metavar="RUN",
    shell_complete=complete_runs,
    help="Treat this run as deleted. With --delete, its folder is deleted, too. Repeat for several.",
)
@store_option
@json_option
def gc(delete: bool, drop: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Show the artifacts that no run uses, and the leftovers of killed attempts. With --delete, delete them.

    Files of a run that is under way are never touched. Artifacts that runs of other stores use by path count as unused.
    """
    from pipeline.runs.garbage import collect
    from pipeline.views import tables

    found = collect(open_store(store), drop, delete, say_waiting)
    print_result(as_json, found, lambda: tables.garbage(found, delete))
