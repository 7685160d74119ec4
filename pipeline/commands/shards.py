"""Commands for data: `retort stats`, `verify` and `shards`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from pipeline.commands import console
from pipeline.reference.completion import complete_runs_or_paths


@click.command(short_help="Show what is in shards of pairs.")
@click.argument("target", shell_complete=complete_runs_or_paths)
@console.store_option
@click.option("--deep", is_flag=True, help="Read and hash every tar again.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write a page with histograms and samples, and the histograms as PNG and SVG files beside it.",
)
@click.option("--sample", "samples", type=click.IntRange(0), default=0, help="Also write this many decoded samples.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("samples"), show_default=True)
@console.json_option
def stats(target: str, store: str | None, deep: bool, html: Path | None, samples: int, out: Path, as_json: bool) -> int:
    """Show what is in TARGET: a run, a sealed `pairs` artifact, or a folder or URL of shards. The shards may be any
    webdataset, including one that Retort did not make.

    The exit code is 1 if something is damaged. With --sample, images and their prompts are written to the folder --out.
    Images of shards that Retort did not make are scaled down to sides of at most 1024 pixels.
    """
    from pipeline.views import tables
    from stages.data.inspection import inspect_shards

    found = {place: inspect_shards(place, deep=deep) for place in _places(target, store, "pairs")}
    damaged = _report(as_json, found, tables.stats)
    for number, (place, report) in enumerate(found.items()):
        if len(found) == 1:
            _show(place, report, html, samples, out)
        else:
            _show(place, report, html and html.with_stem(f"{html.stem}-{number}"), samples, out / str(number))
    return damaged


@click.command(short_help="Check artifacts by hashing them again.")
@click.argument("target", shell_complete=complete_runs_or_paths)
@console.store_option
@console.json_option
def verify(target: str, store: str | None, as_json: bool) -> int:
    """Read and hash everything in TARGET again, and list what is damaged. TARGET is the path of an artifact of any
    kind, RUN/STAGE, a run (all its artifacts), or a folder or URL of shards. The exit code is 1 if something is
    damaged."""
    from pipeline.store.artifacts import verify
    from pipeline.views import tables
    from stages.data.inspection import inspect_shards

    found = {
        place: verify(Path(place)) if _is_artifact(place) else inspect_shards(place, deep=True)
        for place in _places(target, store)
    }
    return _report(as_json, found, tables.verified)


@click.group()
def shards() -> None:
    """Repair and export shards."""


@shards.command()
@click.argument("target", metavar="ARTIFACT|RUN/STAGE")
@console.store_option
@console.execution_options
def repair(target: str, store: str | None, how: console.Execution) -> None:
    """Make damaged shards of the sealed `pairs` ARTIFACT again, byte for byte.

    The artifact is unsealed first: no stage can use it until it is whole again. If the command is killed, repeat it.
    """
    from pipeline.planning import Selection
    from pipeline.runs.repair import plan_repair

    artifact = console.find_artifact(target, store)
    found = plan_repair(artifact)
    if not found.needed:
        console.print_result(how.as_json, {"repaired": [], "changed": []}, lambda: f"{artifact}: nothing to repair")
        return
    found.unseal(console.say_waiting if how.wait else None)
    console.carry_out(found.loaded, found.loaded.manifest.name, Selection(), replace(how, quiet=True))
    changed = found.changed()
    result = {"repaired": list(found.damaged), "changed": changed}
    console.print_result(how.as_json, result, lambda: f"made again: {', '.join(found.damaged) or 'only the seal'}")
    if changed:
        click.echo(
            f"sealed again, but with different bytes: {', '.join(changed)}; the hardware or the versions have changed; "
            "run `retort shards repair` on the other artifacts that share these shards, too",
            err=True,
        )


@shards.command()
@click.argument("target", metavar="ARTIFACT|RUN/STAGE")
@click.argument("out", type=click.Path(path_type=Path))
@console.store_option
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
    from stages.data.export import EXPORTS

    artifact = console.find_artifact(target, store)
    found = load_artifact(artifact)
    if found.kind != "pairs":
        raise UsageError(f"{artifact} is of kind {found.kind}; only pairs have shards")
    if out.exists():
        raise UsageError(f"{out} already exists; give another path")
    EXPORTS[form](found, out)
    click.echo(f"{out}")


def _places(target: str, store: str | None, kind: str | None = None) -> list[str]:
    """Return the paths that TARGET stands for: a path or URL itself, the artifact of RUN/STAGE, or a run's finished
    artifacts of one `kind` (default: all kinds)."""
    if "://" in target or Path(target).exists():
        return [target]
    from pipeline.errors import UsageError
    from pipeline.runs import Run, status_of

    if "/" in target:
        artifact = console.find_artifact(target, store)
        if not artifact.exists():
            raise UsageError(f"{artifact} does not exist")
        return [str(artifact)]
    try:
        run = Run.find(console.open_store(store), target)
    except UsageError as error:
        raise UsageError(f"{target} is neither a folder nor a run: {error}") from None
    made = [s["artifact"] for s in status_of(run).values() if kind in (None, s["kind"]) and s["state"] == "done"]
    if not made:
        raise UsageError(f"run {target} has no finished {kind or 'stage'} yet; see `retort status {target}`")
    return made


def _is_artifact(place: str) -> bool:
    from pipeline.store import RECORD

    return (Path(place) / RECORD).exists()


def _show(place: str, report: dict[str, Any], html: Path | None, samples: int, out: Path) -> None:
    """Write the page `html` and the folder `out` of samples, if they are asked for."""
    from pipeline.store import load_artifact
    from stages.base import StageError
    from stages.reports.gallery import GRID, pictures, write_page, write_samples

    if not html and not samples:
        return
    artifact = load_artifact(Path(place)) if _is_artifact(place) else None
    try:
        shown = pictures(place, artifact, max(samples, GRID if html else 0))
        grid = list(islice(shown, GRID))
    except StageError as error:
        if samples and not report["damaged"]:
            raise
        click.echo(f"no samples: {error}", err=True)
        grid, shown = [], iter(())
    if html:
        write_page(html, report, grid)
        click.echo(f"page: {html}", err=True)
    if samples and grid:
        write_samples(out, islice(chain(grid, shown), samples))
        click.echo(f"samples: {out}", err=True)


def _report(as_json: bool, found: dict[str, dict[str, Any]], table: Callable[[dict[str, Any]], str]) -> int:
    """Print the reports. If there are several, each begins with the path of its target. Return the exit code."""
    if len(found) == 1:
        (report,) = found.values()
        console.print_result(as_json, report, lambda: table(report))
    else:
        texts = (f"{place}\n{table(report)}" for place, report in found.items())
        console.print_result(as_json, list(found.values()), lambda: "\n\n".join(texts))
    return int(any(report["damaged"] for report in found.values()))
