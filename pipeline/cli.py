"""The command `retort`. Only click is imported at the top: help must be instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.manifest import Loaded
    from pipeline.plan import Plan
    from pipeline.runs import Run
    from pipeline.store import Store

F = TypeVar("F", bound=Callable[..., Any])
INTERRUPTED = 130

_set = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a setting of the manifest."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_store = click.option(
    "--store",
    envvar="RETORT_STORE",
    metavar="FOLDER",
    help="The store; default: RETORT_STORE, the manifest's, ./retort-store.",
)
_name = click.option("--name", help="Name of the run; default: the manifest's name.")


def _execution(command: F) -> F:
    for option in (
        click.option(
            "--engine",
            type=click.Choice(["ray", "inline"]),
            default="ray",
            show_default=True,
            help="ray: worker processes; inline: all in this process, for debugging.",
        ),
        click.option("--wait", is_flag=True, help="Wait for locks that other runs hold."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="retort", prog_name="retort")
def cli() -> None:
    """Distil slow diffusion teachers into one- and few-step students.

    \b
    retort submit manifests/digits.yaml    run a pipeline
    retort resume RUN [STAGE]              carry on after anything
    retort stats SHARDS                    what is in a dataset of pairs
    """


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@_set
@click.option("--only", metavar="STAGE", help="Make this stage alone; its inputs must be there.")
@_name
@_store
@_execution
@_json
def submit(
    manifest: Path,
    overrides: tuple[str, ...],
    only: str | None,
    name: str | None,
    store: str | None,
    engine: str,
    wait: bool,
    debug: bool,
    as_json: bool,
) -> None:
    """Run the pipeline of MANIFEST, reusing whatever the store already holds."""
    from pipeline import manifest as manifests

    loaded = manifests.load(manifest, _with_store(overrides, store))
    _carry_out(loaded, name or loaded.manifest.name, only, engine, wait, as_json)


@cli.command()
@click.argument("run_name", metavar="[RUN]", required=False)
@click.argument("stage", required=False)
@_store
@_execution
@_json
def resume(
    run_name: str | None, stage: str | None, store: str | None, engine: str, wait: bool, debug: bool, as_json: bool
) -> None:
    """Carry on with RUN, or with one STAGE of it, doing no work twice."""
    from pipeline.runs import Run

    run = Run.find(_open_store(store), run_name)
    _carry_out(run.manifest(), run.name, stage, engine, wait, as_json)


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@_set
@_name
@_store
@_json
def plan(manifest: Path, overrides: tuple[str, ...], name: str | None, store: str | None, as_json: bool) -> None:
    """Show what submitting MANIFEST would do, and why. Nothing is changed."""
    from pipeline import manifest as manifests
    from pipeline import tables
    from pipeline.runs import Run

    loaded = manifests.load(manifest, _with_store(overrides, store))
    found = _open_store(loaded.manifest.store)
    planned = _plan(loaded, Run(found, name or loaded.manifest.name))
    _print(as_json, {s.name: s.as_dict() for s in planned}, lambda: tables.plan(planned))


@cli.command()
@click.argument("run_name", metavar="[RUN]", required=False)
@_store
@_json
def status(run_name: str | None, store: str | None, as_json: bool) -> None:
    """Show how far each stage of RUN is."""
    from pipeline import tables
    from pipeline.runs import Run
    from pipeline.status import status_of

    run = Run.find(_open_store(store), run_name)
    stages = status_of(run)
    _print(as_json, {"run": run.name, "stages": stages}, lambda: tables.status(run.name, stages))


@cli.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Read and hash every tar again.")
@_json
def stats(shards: Path, deep: bool, as_json: bool) -> None:
    """Say what is in SHARDS: a sealed `pairs` artifact, or a folder of shards. Exit code 1 if some are damaged."""
    from pipeline import tables
    from stages.base import StageError
    from stages.data.inspect import inspect_shards

    try:
        found = inspect_shards(shards, deep=deep)
    except StageError as error:
        raise click.UsageError(str(error)) from None
    _print(as_json, found, lambda: tables.stats(found))
    if found["damaged"]:
        sys.exit(1)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", "prompts", multiple=True, required=True, help="Repeat for several.")
@click.option("--count", "-n", type=click.IntRange(1), default=4, show_default=True, help="Images of each prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="For a teacher.")
@click.option("--guidance-scale", type=click.FloatRange(1.0), default=3.0, show_default=True, help="For a teacher.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
def sample(
    artifact: Path, prompts: tuple[str, ...], count: int, seed: int, steps: int, guidance_scale: float, out: Path
) -> None:
    """Draw images with a sealed teacher or student: one row a prompt."""
    from pipeline.errors import UsageError
    from pipeline.store import load_artifact
    from stages.base import StageError

    found = load_artifact(artifact)
    try:
        from stages.sampling import draw

        draw(found, list(prompts), count, seed, steps, guidance_scale, out)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}")


# --- What the commands share -------------------------------------------------------------------------


def _with_store(overrides: tuple[str, ...], store: str | None) -> list[str]:
    return [*overrides, *([f"store={json.dumps(store, ensure_ascii=False)}"] if store else [])]


def _open_store(store: str | None) -> Store:
    from pipeline.store import Store

    return Store(store or "./retort-store")


def _plan(loaded: Loaded, run: Run) -> Plan:
    from pipeline.content import read_contents
    from pipeline.plan import make_plan

    contents = read_contents(loaded, run.store.root / "contents.json")
    return make_plan(loaded, contents, run.store, run.plan())


def _carry_out(loaded: Loaded, name: str, only: str | None, engine: str, wait: bool, as_json: bool) -> None:
    from pipeline import tables
    from pipeline.content import pinned
    from pipeline.engine import InlineEngine
    from pipeline.errors import UsageError
    from pipeline.report import reporter
    from pipeline.runner import Runner
    from pipeline.runs import Run

    if only is not None and only not in loaded.order:
        raise UsageError(f"no stage {only!r}; there are: {', '.join(loaded.order)}")
    store = _open_store(loaded.manifest.store)
    store.create()
    run = Run(store, name)
    with run.held():
        planned = _plan(loaded, run)
        chosen: Any = InlineEngine()
        if engine == "ray":
            from pipeline.cluster import OVERRIDES, RayEngine

            for variable in filter(os.environ.get, OVERRIDES):
                click.echo(f"{variable} is set and ignored: this run starts a Ray of its own", err=True)
            chosen = RayEngine()
        shown = reporter(quiet=as_json)
        signal.signal(signal.SIGTERM, _interrupt)
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
    _print(as_json, {"run": name, "stages": result}, lambda: tables.done(made))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _print(as_json: bool, value: Any, table: Callable[[], str]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else table())


def main() -> None:
    """Exit codes: 0 done, 1 a stage failed, 2 manifest or usage wrong, 3 locked, 130 interrupted and resumable."""
    debug = "--debug" in sys.argv
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)
    except Exception as error:
        from pipeline.engine import describe
        from pipeline.errors import ManifestError, RetortError

        if debug or not isinstance(error, RetortError | OSError):
            raise
        # a manifest's problems begin with file:line:column, as editors expect
        prefix = "" if isinstance(error, ManifestError) else "retort: "
        click.echo(f"{prefix}{error if isinstance(error, RetortError) else describe(error)}", err=True)
        sys.exit(error.exit_code if isinstance(error, RetortError) else 1)


if __name__ == "__main__":
    main()
