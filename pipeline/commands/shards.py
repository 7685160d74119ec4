"""Commands for data: `retort stats`, `verify` and `shards`."""

from __future__ import annotations

import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from pipeline.commands.console import (
    Execution,
    carry_out,
    execution_options,
    find_artifact,
    json_option,
    open_store,
    print_result,
    say_waiting,
    store_option,
)
from pipeline.reference.completion import complete_runs_or_paths


@click.command(short_help="Show what is in shards of pairs.")
@click.argument("target", shell_complete=complete_runs_or_paths)
@store_option
@click.option("--deep", is_flag=True, help="Read and hash every tar again.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write a page with histograms and samples, and the histograms as PNG and SVG files beside it.",
)
@click.option("--sample", "samples", type=click.IntRange(0), default=0, help="Also write this many decoded samples.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("samples"), show_default=True)
@json_option
def stats(
    target: str, store: str | None, deep: bool, html: Path | None, samples: int, out: Path, as_json: bool
) -> None:
    """Show what is in TARGET: a run, a sealed `pairs` artifact, or a folder or URL of shards. The shards may be any
    webdataset, including one that Retort did not make.

    The exit code is 1 if something is damaged. With --sample, images and their prompts are written to the folder --out.
    Images of shards that Retort did not make are scaled down to sides of at most 1024 pixels.
    """
    from pipeline.views import tables

    found = {place: _inspect(place, deep) for place in _places(target, store, "pairs")}
    _report(as_json, found, tables.stats)
    for number, (place, report) in enumerate(found.items()):
        several = len(found) > 1
        if html or samples:
            _show(place, report, _numbered(html, number, several), samples, out / str(number) if several else out)
    _exit(found)


@click.command(short_help="Check artifacts by hashing them again.")
@click.argument("target", shell_complete=complete_runs_or_paths)
@store_option
@json_option
def verify(target: str, store: str | None, as_json: bool) -> None:
    """Read and hash everything in TARGET again, and list what is damaged. TARGET is the path of an artifact of any
    kind, RUN/STAGE, a run (all its artifacts), or a folder or URL of shards. The exit code is 1 if something is
    damaged."""
    from pipeline.views import tables

    found = {place: _verify(place) for place in _places(target, store)}
    _report(as_json, found, tables.verified)
    _exit(found)


@click.group()
def shards() -> None:
    """Repair and export shards."""


@shards.command()
@click.argument("target", metavar="ARTIFACT|RUN/STAGE")
@store_option
@execution_options
@json_option
def repair(target: str, store: str | None, engine: str, wait: bool, as_json: bool) -> None:
    """Make damaged shards of the sealed `pairs` ARTIFACT again, byte for byte.

    The artifact is unsealed first: no stage can use it until it is whole again. If the command is killed, repeat it.
    """
    from pipeline.planning import Selection
    from pipeline.runs.repair import plan_repair

    artifact = find_artifact(target, store)
    found = plan_repair(artifact)
    if not found.needed:
        print_result(as_json, {"repaired": [], "changed": []}, lambda: f"{artifact}: nothing to repair")
        return
    found.unseal(say_waiting if wait else None)
    carry_out(found.loaded, found.loaded.manifest.name, Selection(), Execution(engine, wait, quiet=True))
    changed = found.changed()
    result = {"repaired": list(found.damaged), "changed": changed}
    print_result(as_json, result, lambda: f"made again: {', '.join(found.damaged) or 'only the seal'}")
    if changed:
        click.echo(
            f"sealed again, but with different bytes: {', '.join(changed)}; the hardware or the versions have changed; "
            "run `retort shards repair` on the other artifacts that share these shards, too",
            err=True,
        )


@shards.command()
@click.argument("target", metavar="ARTIFACT|RUN/STAGE")
@click.argument("out", type=click.Path(path_type=Path))
@store_option
@click.option(
    "--to",
    "form",
    type=click.Choice(["parquet", "huggingface"]),
    required=True,
    help="parquet: one file, one row group for each shard; huggingface: a webdataset folder with a dataset card.",
)
def export(target: str, out: Path, store: str | None, form: str) -> None:
    """Write the sealed `pairs` ARTIFACT to OUT as Parquet or as a Hugging Face dataset."""
    from pipeline.errors import UsageError
    from pipeline.store import load_artifact
    from stages.base import StageError
    from stages.data.export import EXPORTS

    artifact = find_artifact(target, store)
    found = load_artifact(artifact)
    if found.kind != "pairs":
        raise UsageError(f"{artifact} is of kind {found.kind}; only pairs have shards")
    if out.exists():
        raise UsageError(f"{out} already exists; give another path")
    try:
        EXPORTS[form](found, out)
    except StageError as error:
        raise UsageError(str(error)) from None
    click.echo(f"{out}")


def _places(target: str, store: str | None, kind: str | None = None) -> list[str]:
    """Return the paths that TARGET stands for: a path or URL itself, the artifact of RUN/STAGE, or a run's finished
    artifacts of one `kind` (default: all kinds)."""
    if "://" in target or Path(target).exists():
        return [target]
    from pipeline.errors import UsageError
    from pipeline.runs import Run, status_of

    if "/" in target:
        artifact = find_artifact(target, store)
        if not artifact.exists():
            raise UsageError(f"{artifact} does not exist")
        return [str(artifact)]
    try:
        run = Run.find(open_store(store), target)
    except UsageError as error:
        raise UsageError(f"{target} is neither a folder nor a run: {error}") from None
    made = [s["artifact"] for s in status_of(run).values() if kind in (None, s["kind"]) and s["state"] == "done"]
    if not made:
        raise UsageError(f"run {target} has no finished {kind or 'stage'} yet; see `retort status {target}`")
    return made


def _verify(place: str) -> dict[str, Any]:
    from pipeline.store import RECORD
    from pipeline.store.artifacts import verify

    return verify(Path(place)) if (Path(place) / RECORD).exists() else _inspect(place, deep=True)


def _inspect(place: str, deep: bool) -> dict[str, Any]:
    from pipeline.errors import UsageError
    from stages.base import StageError
    from stages.data.inspection import inspect_shards

    try:
        return inspect_shards(place, deep=deep)
    except StageError as error:
        raise UsageError(str(error)) from None


def _show(place: str, report: dict[str, Any], html: Path | None, samples: int, out: Path) -> None:
    from pipeline.errors import UsageError
    from pipeline.store import RECORD, load_artifact
    from stages.base import StageError
    from stages.reports.gallery import GRID, pictures, write_page, write_samples

    artifact = load_artifact(Path(place)) if (Path(place) / RECORD).exists() else None
    try:
        shown = pictures(place, artifact, max(samples, GRID if html else 0))
        grid = list(islice(shown, GRID))
    except StageError as error:
        if samples and not report["damaged"]:
            raise UsageError(str(error)) from None
        click.echo(f"no samples: {error}", err=True)
        grid, shown = [], iter(())
    if html:
        write_page(html, report, grid)
        click.echo(f"page: {html}", err=True)
    if samples and grid:
        try:
            write_samples(out, islice(chain(grid, shown), samples))
        except StageError as error:
            raise UsageError(str(error)) from None
        click.echo(f"samples: {out}", err=True)


def _numbered(path: Path | None, number: int, several: bool) -> Path | None:
    return path.with_stem(f"{path.stem}-{number}") if path and several else path


def _report(as_json: bool, found: dict[str, dict[str, Any]], table: Any) -> None:
    reports = list(found.values())
    print_result(as_json, reports[0] if len(reports) == 1 else reports, lambda: "\n\n".join(_headed(found, table)))


def _headed(found: dict[str, dict[str, Any]], table: Any) -> list[str]:
    """Return one text for each report. If there are several, each begins with the path of its target."""
    return [f"{place}\n{table(report)}" if len(found) > 1 else table(report) for place, report in found.items()]


def _exit(found: dict[str, dict[str, Any]]) -> None:
    if any(report["damaged"] for report in found.values()):
        sys.exit(1)
