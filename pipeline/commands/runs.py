"""The commands that look at runs: `retort runs`, `status`, `logs`, `gc`."""

from __future__ import annotations

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


@click.command(short_help="Show how far each stage of a run is.")
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@click.option("--watch", is_flag=True, help="Show it live, until nobody carries the run out.")
@store_option
@json_option
def status(run_name: str | None, watch: bool, store: str | None, as_json: bool) -> None:
    """Show how far each stage of RUN is, how fast, what it cost, and where its artifact lies."""
    from pipeline.runs import status_of
    from pipeline.views import tables
    from pipeline.views.watch import watch as follow

    run = find_run(run_name, store)
    if watch and as_json:
        raise click.UsageError("--watch is for people; programs follow `retort logs RUN -f --json`")
    if watch:
        follow(run, lambda: tables.status(run.name, str(run.store.root), status_of(run)))
        return
    stages = status_of(run)
    print_result(
        as_json, {"run": run.name, "stages": stages}, lambda: tables.status(run.name, str(run.store.root), stages)
    )


@click.command(short_help="Print or follow a stage's log.")
@click.argument("run_name", metavar="RUN", shell_complete=complete_runs_or_paths)
@click.argument("stage", required=False, shell_complete=complete_stages)
@click.option("--follow", "-f", is_flag=True, help="Go on while the run is carried out.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's events instead, a JSON object a line.")
@store_option
def logs(run_name: str, stage: str | None, follow: bool, as_json: bool, store: str | None) -> None:
    """Print the log of a STAGE of RUN; without STAGE, what happened in the run."""
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
        return
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


@click.command(short_help="Show or remove what no run refers to.")
@click.option("--delete", is_flag=True, help="Remove it; without this, nothing is changed.")
@click.option(
    "--drop",
    multiple=True,
    metavar="RUN",
    shell_complete=complete_runs,
    help="Take this run for gone, and remove its folder too.",
)
@store_option
@json_option
def gc(delete: bool, drop: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Show what no run refers to any more, and what killed attempts left; with --delete, remove it.

    What a run that is under way holds is never touched. What runs of other stores use by its path is not known here.
    """
    from pipeline.runs.garbage import collect
    from pipeline.views import tables

    found = collect(open_store(store), drop, delete, say_waiting)
    print_result(as_json, found, lambda: tables.garbage(found, delete))
