"""What commands share: options, opening a store, planning and carrying out. Only click is imported at the top."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.manifest import Loaded
    from pipeline.plan import Plan
    from pipeline.runs import Run
    from pipeline.store import Store

F = TypeVar("F", bound=Callable[..., Any])
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a setting of the manifest."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
store_option = click.option(
    "--store",
    envvar="RETORT_STORE",
    metavar="FOLDER",
    help="The store; default: RETORT_STORE, the manifest's, ./retort-store.",
)
name_option = click.option("--name", help="Name of the run; default: the manifest's name.")


def execution_options(command: F) -> F:
    for option in (
        click.option(
            "--engine",
            type=click.Choice(["ray", "inline", "attached"]),
            default="ray",
            show_default=True,
            help="ray: worker processes; inline: all in this process, for debugging; "
            "attached: workers of the Ray cluster that this process runs in.",
        ),
        click.option("--wait", is_flag=True, help="Wait for locks that other runs hold."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ):
        command = option(command)
    return command


def open_store(store: str | None) -> Store:
    from pipeline.store import Store

    return Store(store or "./retort-store")


def plan_run(loaded: Loaded, run: Run) -> Plan:
    from pipeline.content import read_contents
    from pipeline.plan import make_plan

    contents = read_contents(loaded, run.store.root / "contents.json")
    return make_plan(loaded, contents, run.store, run.plan())


def carry_out(
    loaded: Loaded, name: str, only: str | None, engine: str, wait: bool, as_json: bool, show: bool = True
) -> None:
    """Plan and run, holding the run's lock. `as_json` prints the result as JSON, without `show` nothing is printed."""
    from pipeline import tables
    from pipeline.content import pinned
    from pipeline.engine import InlineEngine
    from pipeline.errors import UsageError
    from pipeline.report import reporter
    from pipeline.runner import Runner
    from pipeline.runs import Run

    if only is not None and only not in loaded.order:
        raise UsageError(f"no stage {only!r}; there are: {', '.join(loaded.order)}")
    store = open_store(loaded.manifest.store)
    store.create()
    run = Run(store, name)
    with run.held():
        planned = plan_run(loaded, run)
        chosen: Any = InlineEngine()
        if engine != "inline":
            from pipeline.cluster import RayEngine

            if engine == "ray":
                ignore_overrides("this run starts a Ray of its own")
            chosen = RayEngine(attached=engine == "attached")
        shown = reporter(quiet=as_json)
        signal.signal(signal.SIGTERM, interrupt)
        runner = Runner(run, loaded.manifest, chosen, shown, wait)
        runner.check(planned, only)
        run.freeze(pinned(loaded.manifest, {s.name: s.contents for s in planned}), planned)
        try:
            runner.execute(planned, only)
        except KeyboardInterrupt:
            run.event("run_interrupted")
            shown.close()
            click.echo(f"interrupted; carry on with: retort resume {name} --store {store.root}", err=True)
            raise
        finally:
            shown.close()
            chosen.close()
    made = [s for s in planned if store.is_sealed(s.artifact)]
    result = {s.name: {"kind": s.artifact.kind, "artifact": str(s.artifact.folder)} for s in made}
    if show:
        print_result(as_json, {"run": name, "stages": result}, lambda: tables.done(made))


def ignore_overrides(instead: str) -> None:
    """Say that Ray's variables are not followed, and what is; Ray itself would prefer them to an address in code."""
    from pipeline.nodes import OVERRIDES

    for variable in filter(os.environ.get, OVERRIDES):
        click.echo(f"{variable} is set and ignored: {instead}", err=True)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def print_result(as_json: bool, value: Any, table: Callable[[], str]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else table())
