"""Shared parts of the commands: options, opening a store, planning and running. Imports only click at the top."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline import DEFAULT_STORE
from pipeline.reference.completion import complete_stages

if TYPE_CHECKING:
    from pipeline.manifest import Loaded
    from pipeline.planning import Plan, Selection
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
    help=f"The store. Default: RETORT_STORE, then the manifest's store, then {DEFAULT_STORE}.",
)
name_option = click.option("--name", help="Name of the run; default: the manifest's name.")


def execution_options(command: F) -> F:
    """Add --engine, --wait and --debug to a command."""
    for option in (
        click.option(
            "--engine",
            type=click.Choice(["ray", "inline", "attached"]),
            default="ray",
            show_default=True,
            help="ray: worker processes. inline: everything in this process, for debugging. "
            "attached: workers of the Ray cluster that this process runs in.",
        ),
        click.option("--wait", is_flag=True, help="Wait for locks that other runs hold."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
    ):
        command = option(command)
    return command


def selection_options(command: F) -> F:
    """Add --only, --from and --force to a command. It gets them as one argument `selection`, a Selection."""

    @wraps(command)
    def with_selection(*args: Any, only: Any, onward: Any, force: Any, **others: Any) -> Any:
        from pipeline.planning import Selection

        return command(*args, selection=Selection(only, onward, force), **others)

    for name, parameter, text in (
        ("--force", "force", "Make this stage again, and all stages that depend on it."),
        ("--from", "onward", "Make this stage and all stages that depend on it."),
        ("--only", "only", "Make only this stage. Its inputs must already exist. Repeat for several."),
    ):
        click.option(name, parameter, multiple=True, metavar="STAGE", help=text, shell_complete=complete_stages)(
            with_selection
        )
    return with_selection  # type: ignore[return-value]


def open_store(store: str | None) -> Store:
    from pipeline.store import Store

    return Store(store or DEFAULT_STORE)


def is_manifest(target: str) -> bool:
    """Whether a command's argument is the path of a manifest, and not the name of a run."""
    return Path(target).suffix in (".yaml", ".yml") or Path(target).is_file()


def find_run(target: str | None, store: str | None) -> Run:
    """Find a run by its name or by its manifest. Without either, return the only run in the store.

    The store is `store`, else the manifest's, else the default. Raises UsageError if there is no such run.
    """
    from pipeline.manifest.model import name_and_store
    from pipeline.runs import Run

    if target is not None and is_manifest(target):
        name, own = name_and_store(Path(target))
        return Run.find(open_store(store or own), name)
    return Run.find(open_store(store), target)


def find_artifact(target: str, store: str | None) -> Path:
    """Return the folder of a sealed artifact, given as a path or as RUN/STAGE.

    Raises UsageError for an unknown run or stage, and for a name of several stages.
    """
    from pipeline.errors import UsageError, suggest
    from pipeline.manifest.fields import is_artifact_path
    from pipeline.manifest.matrix import chosen

    run_name, _, stage = target.partition("/")
    if Path(target).exists() or not stage or is_artifact_path(stage):
        return Path(target)
    run = find_run(run_name, store)
    plan = run.plan()
    if stage not in plan:
        several = chosen(list(plan), stage)
        if len(several) > 1:
            raise UsageError(f"run {run.name} has several stages {stage}; name one: {', '.join(several)}")
        if not several:
            raise UsageError(f"run {run.name} has no stage {stage!r}{suggest(stage, list(plan))}")
        (stage,) = several
    return run.store.folder(plan[stage]["kind"], plan[stage]["fingerprint"])


def store_override(store: str | None) -> list[str]:
    """Return the --set that overrides the manifest's store, if `store` is given."""
    return [f"store={json.dumps(store, ensure_ascii=False)}"] if store else []


def plan_run(loaded: Loaded, run: Run, force: Collection[str] = ()) -> Plan:
    from pipeline.planning import make_plan, read_contents

    contents = read_contents(loaded, run.store.hashes)
    return make_plan(loaded, contents, run.store, run.previous(), force)


@dataclass(frozen=True)
class Execution:
    """How stages are run, and what is printed."""

    engine: str = "ray"
    wait: bool = False
    as_json: bool = False
    quiet: bool = False
    """Print nothing at all."""


def carry_out(loaded: Loaded, name: str, selection: Selection, how: Execution) -> Plan:
    """Plan a run and run its stages, holding the run's lock. Return the plan."""
    from pipeline.runs import Run, Runner
    from pipeline.views.progress import reporter

    run = Run(open_store(loaded.manifest.store), name)
    with held(loaded, run, selection, how.wait) as (planned, chosen):
        engine = _engine(how.engine)
        shown = reporter(quiet=how.as_json or how.quiet)
        try:
            Runner(run, loaded.manifest, engine, shown, how.wait).execute(planned, chosen)
        except KeyboardInterrupt:
            run.event("run_interrupted")
            shown.close()
            click.echo(f"interrupted; carry on with: retort resume {name} --store {run.store.root}", err=True)
            raise
        finally:
            shown.close()
            engine.close()
    if not how.quiet:
        show_done(run, planned, how.as_json)
    return planned


@contextmanager
def held(loaded: Loaded, run: Run, selection: Selection, wait: bool) -> Iterator[tuple[Plan, set[str]]]:
    """Hold the run's lock as its only driver. Yield its plan and the names of the stages to run.

    The plan is stored, and artifacts of forced stages are unsealed, before anything is yielded.
    """
    from pipeline.planning.content import pinned
    from pipeline.runs import force
    from pipeline.store.locks import share

    if loaded.problems:
        plan_run(loaded, run)  # raises these problems, together with those that only planning finds
    run.store.create()
    waiting = say_waiting if wait else None
    with run.held(waiting):
        with share(run.store.garbage_lock):  # keeps `gc` from deleting reused artifacts before the plan is stored
            planned = plan_run(loaded, run, selection.forced(loaded.order))
            chosen = selection.of(planned)
            force.check(run, planned, chosen)
            run.freeze(pinned(loaded.manifest, {s.name: s.contents for s in planned}), planned)
        force.forget(run, planned, waiting)
        yield planned, chosen


def say_waiting(text: str) -> None:
    click.echo(f"waiting: {text}", err=True)


def say_warning(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


def show_done(run: Run, planned: Plan, as_json: bool) -> None:
    """Print the paths of a run's artifacts."""
    from pipeline.views import tables

    made = [s for s in planned if run.store.is_sealed(s.artifact)]
    result = {s.name: {"kind": s.artifact.kind, "artifact": str(s.artifact.folder)} for s in made}
    print_result(as_json, {"run": run.name, "stages": result}, lambda: tables.done(made))


def show_plan(loaded: Loaded, name: str, selection: Selection, as_json: bool) -> None:
    """Print what a run would do."""
    from pipeline.runs import Run, force
    from pipeline.views import tables

    run = Run(open_store(loaded.manifest.store), name)
    planned = plan_run(loaded, run, selection.forced(loaded.order))
    chosen = selection.of(planned) if selection.given else {stage.name for stage in planned}
    force.check(run, planned, chosen)
    shown = [stage for stage in planned if stage.name in chosen]
    print_result(as_json, {s.name: s.as_dict() for s in shown}, lambda: tables.plan(shown))
    for stage in shown:
        if stage.state in ("run", "resume"):
            for text in stage.artifact.stage.warnings(stage.artifact.inputs):
                say_warning(f"{stage.name}: {text}")


def show_difference(loaded: Loaded, other: str, as_json: bool) -> None:
    """Print how a manifest's plan differs from the plan of run `other`."""
    from pipeline.planning.fingerprint import difference
    from pipeline.runs import Run
    from pipeline.views import tables

    store = open_store(loaded.manifest.store)
    before = Run.find(store, other).plan()
    now = plan_run(loaded, Run(store, loaded.manifest.name))
    found = difference(before, {stage.name: stage.as_dict() for stage in now})
    print_result(as_json, found, lambda: tables.difference(found))


def _engine(name: str) -> Any:
    from pipeline.engines import InlineEngine

    if name == "inline":
        return InlineEngine()
    from pipeline.engines.ray import RayEngine

    if name == "ray":
        ignore_overrides("this run starts a Ray of its own")
    return RayEngine(attached=name == "attached")


def ignore_overrides(instead: str) -> None:
    """Print that Ray's environment variables are ignored, and what is used instead.

    Ray itself would prefer them to an address in code.
    """
    from pipeline.engines.nodes import OVERRIDES

    for variable in filter(os.environ.get, OVERRIDES):
        click.echo(f"{variable} is set and ignored: {instead}", err=True)


def print_result(as_json: bool, value: Any, table: Callable[[], str]) -> None:
    """Print a result as JSON or as a table, without secrets in URLs."""
    from stages.data.urls import redacted

    click.echo(redacted(json.dumps(value, indent=2, ensure_ascii=False) if as_json else table()))
