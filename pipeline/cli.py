"""The command `retort`. Only click is imported at the top: help must be instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from pipeline.commands.cluster import Cluster, cluster_options, resume_on, stop, submit_to, submitted_by
from pipeline.commands.compare import compare
from pipeline.commands.console import (
    Execution,
    carry_out,
    execution_options,
    find_artifact,
    find_run,
    is_manifest,
    json_option,
    name_option,
    selection_options,
    set_option,
    show_difference,
    show_plan,
    store_option,
    store_override,
)
from pipeline.commands.help import completion, explain, init
from pipeline.commands.runs import gc, logs, runs, status
from pipeline.commands.shards import shards, stats
from pipeline.completion import complete_runs_or_paths, complete_stages

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
@selection_options
@click.option("--dry-run", is_flag=True, help="Print the plan and change nothing.")
@name_option
@store_option
@execution_options
@cluster_options
@json_option
def submit(
    manifest: Path,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    onward: tuple[str, ...],
    force: tuple[str, ...],
    dry_run: bool,
    name: str | None,
    store: str | None,
    engine: str,
    wait: bool,
    as_json: bool,
    cluster: Cluster | None,
) -> None:
    """Run the pipeline of MANIFEST, reusing whatever the store already holds."""
    from pipeline import manifest as manifests
    from pipeline.selection import Selection

    loaded = manifests.examine(manifest, [*overrides, *store_override(store)])
    run_name, selection = name or loaded.manifest.name, Selection(only, onward, force)
    if dry_run:
        show_plan(loaded, run_name, selection, as_json)
    elif cluster:
        submit_to(cluster, loaded, run_name, selection, wait, as_json)
    else:
        carry_out(loaded, run_name, selection, Execution(engine, wait, as_json))


@cli.command()
@click.argument("run_name", metavar="[RUN]", required=False, shell_complete=complete_runs_or_paths)
@click.argument("stages", metavar="[STAGE]...", nargs=-1, shell_complete=complete_stages)
@selection_options
@click.option("--dry-run", is_flag=True, help="Print the plan and change nothing.")
@store_option
@execution_options
@cluster_options
@submitted_by
@json_option
def resume(
    run_name: str | None,
    stages: tuple[str, ...],
    only: tuple[str, ...],
    onward: tuple[str, ...],
    force: tuple[str, ...],
    dry_run: bool,
    store: str | None,
    engine: str,
    wait: bool,
    as_json: bool,
    cluster: Cluster | None,
) -> None:
    """Carry on with RUN, or with STAGEs of it, doing no work twice."""
    from pipeline.selection import Selection

    run = find_run(run_name, store)
    selection = Selection((*stages, *only), onward, force)
    if dry_run:
        show_plan(run.manifest(), run.name, selection, as_json)
    elif cluster:
        resume_on(cluster, run, selection, wait, as_json)
    else:
        carry_out(run.manifest(), run.name, selection, Execution(engine, wait, as_json))


@cli.command()
@click.argument("target", metavar="MANIFEST|RUN", shell_complete=complete_runs_or_paths)
@set_option
@selection_options
@click.option("--diff", metavar="RUN", help="Say instead how its settings differ from those of this run.")
@name_option
@store_option
@json_option
def plan(
    target: str,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    onward: tuple[str, ...],
    force: tuple[str, ...],
    diff: str | None,
    name: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Show what submitting MANIFEST, or resuming RUN, would do, and why. Nothing is changed."""
    from pipeline import manifest as manifests
    from pipeline.selection import Selection

    if name is not None and not is_manifest(target):
        raise click.UsageError("--name goes with a manifest; a run has its name")
    if is_manifest(target):
        loaded = manifests.examine(Path(target), [*overrides, *store_override(store)])
        run_name = name or loaded.manifest.name
    else:
        run = find_run(target, store)
        loaded, run_name = run.manifest(overrides), run.name
    if diff is not None and (only or onward or force):
        raise click.UsageError("--diff is about whole plans; leave --only, --from and --force away")
    if diff is not None:
        show_difference(loaded, diff, as_json)
    else:
        show_plan(loaded, run_name, Selection(only, onward, force), as_json)


@cli.command()
@click.argument("artifact", metavar="ARTIFACT|RUN/STAGE")
@click.option("--prompt", "-p", "prompts", multiple=True, required=True, help="Repeat for several.")
@click.option("--count", "-n", type=click.IntRange(1), default=4, show_default=True, help="Images of each prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="For a teacher.")
@click.option("--guidance-scale", type=click.FloatRange(1.0), default=3.0, show_default=True, help="For a teacher.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@store_option
def sample(
    artifact: str,
    prompts: tuple[str, ...],
    count: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    out: Path,
    store: str | None,
) -> None:
    """Draw images with a sealed teacher or student: one row a prompt."""
    from pipeline.errors import UsageError
    from pipeline.store import load_artifact
    from stages.base import StageError

    found = load_artifact(find_artifact(artifact, store))
    try:
        from stages.sampling import draw

        draw(found, list(prompts), count, seed, steps, guidance_scale, out)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}")


for _command in (status, runs, logs, compare, stop, gc, stats, shards, init, explain, completion):
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
    except BrokenPipeError:  # `retort logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
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
