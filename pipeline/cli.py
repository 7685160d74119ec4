"""The command `retort`. Only click is imported at the top: help must be instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from pipeline.console import (
    carry_out,
    execution_options,
    json_option,
    name_option,
    open_store,
    plan_run,
    print_result,
    set_option,
    store_option,
)
from pipeline.help_commands import completion, explain, init
from pipeline.shard_commands import shards, stats

INTERRUPTED = 130


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
@set_option
@click.option("--only", metavar="STAGE", help="Make this stage alone; its inputs must be there.")
@name_option
@store_option
@execution_options
@json_option
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
    carry_out(loaded, name or loaded.manifest.name, only, engine, wait, as_json)


@cli.command()
@click.argument("run_name", metavar="[RUN]", required=False)
@click.argument("stage", required=False)
@store_option
@execution_options
@json_option
def resume(
    run_name: str | None, stage: str | None, store: str | None, engine: str, wait: bool, debug: bool, as_json: bool
) -> None:
    """Carry on with RUN, or with one STAGE of it, doing no work twice."""
    from pipeline.runs import Run

    run = Run.find(open_store(store), run_name)
    carry_out(run.manifest(), run.name, stage, engine, wait, as_json)


@cli.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@set_option
@name_option
@store_option
@json_option
def plan(manifest: Path, overrides: tuple[str, ...], name: str | None, store: str | None, as_json: bool) -> None:
    """Show what submitting MANIFEST would do, and why. Nothing is changed."""
    from pipeline import manifest as manifests
    from pipeline import tables
    from pipeline.runs import Run

    loaded = manifests.load(manifest, _with_store(overrides, store))
    found = open_store(loaded.manifest.store)
    planned = plan_run(loaded, Run(found, name or loaded.manifest.name))
    print_result(as_json, {s.name: s.as_dict() for s in planned}, lambda: tables.plan(planned))


@cli.command()
@click.argument("run_name", metavar="[RUN]", required=False)
@store_option
@json_option
def status(run_name: str | None, store: str | None, as_json: bool) -> None:
    """Show how far each stage of RUN is."""
    from pipeline import tables
    from pipeline.runs import Run
    from pipeline.status import status_of

    run = Run.find(open_store(store), run_name)
    stages = status_of(run)
    print_result(as_json, {"run": run.name, "stages": stages}, lambda: tables.status(run.name, stages))


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


def _with_store(overrides: tuple[str, ...], store: str | None) -> list[str]:
    return [*overrides, *([f"store={json.dumps(store, ensure_ascii=False)}"] if store else [])]


for _command in (stats, shards, init, explain, completion):
    cli.add_command(_command)


def main() -> None:
    """Exit codes: 0 done, 1 a stage failed, 2 manifest or usage wrong, 3 locked, 130 interrupted and resumable."""
    debug = "--debug" in sys.argv
    try:
        sys.exit(cli.main(prog_name="retort", standalone_mode=False) or 0)
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
