"""The command `retort compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from pipeline.commands.console import find_run, json_option, print_result, store_option
from pipeline.reference.completion import complete_runs_or_paths

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Compare students with their teacher.")
@click.argument("run_names", metavar="[RUN]...", nargs=-1, shell_complete=complete_runs_or_paths)
@store_option
@click.option("--html", type=FILE, default=Path("compare.html"), show_default=True, help="Where to write the page.")
@click.option(
    "--figure",
    type=FILE,
    help="Also draw the images with labels and prompts to this file (.png, .pdf, ...), for a README or a paper.",
)
@click.option(
    "--row",
    "row_names",
    multiple=True,
    metavar="NAME",
    help="A row of the figure: its NAME in the table, or `NAME as LABEL`. Repeat for several; default: all rows.",
)
@click.option(
    "--chart", type=FILE, help="Also draw quality against network calls to this file (.png, .svg, .pdf, ...)."
)
@click.option(
    "--columns", type=click.IntRange(1), default=8, show_default=True, help="Maximum number of columns of the figure."
)
@json_option
def compare(
    run_names: tuple[str, ...],
    store: str | None,
    html: Path,
    figure: Path | None,
    row_names: tuple[str, ...],
    chart: Path | None,
    columns: int,
    as_json: bool,
) -> None:
    """Compare the students of RUNs with their teacher. Print a table, and write a page of images from the same noises.

    A section holds students that were evaluated with the same teacher, noises and prompts. They may belong to several
    runs. A figure shows the first section that has all the rows. A chart shows the first section that has students and
    whose rows differ in network calls.
    """
    from pipeline.errors import UsageError
    from pipeline.views import tables
    from pipeline.views.compare import collect, pictured, remarks
    from stages.reports import chart as charts
    from stages.reports import comparison
    from stages.reports.sections import sections

    if row_names and not figure:
        raise UsageError("--row chooses the rows of a figure; give --figure FILE too")
    if chart and not chart.suffix:
        raise UsageError(f"--chart {chart} has no suffix: give .svg, .png or .pdf")
    runs = [find_run(name, store) for name in dict.fromkeys(run_names or (None,))]
    evaluations, not_made = collect(runs)
    compared, missing = sections(evaluations), remarks(not_made)
    page = comparison.page(compared, missing)
    files: list[tuple[str, Path, Callable[[Path], object]]]
    files = [("html", html, lambda path: path.write_text(page, encoding="utf-8"))]
    if figure:
        files.append(("figure", figure, comparison.figure(pictured(compared, row_names), columns).save))
    if chart:
        drawn = next(filter(None, (charts.chart(section.rows) for section in compared)), None)
        if drawn is None:
            raise UsageError("--chart needs students, and rows that differ in network calls")
        files.append(("chart", chart, drawn.savefig))
    for option, path, write in files:
        try:
            write(path)
        except (OSError, ValueError) as error:  # ValueError: unknown format
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"--{option} {path} cannot be written: {why}") from None
    result = {
        "sections": [section.as_dict() for section in compared],
        "not_made": [one.as_dict() for one in not_made],
        "page": str(html),
        "figure": figure and str(figure),
        "chart": chart and str(chart),
    }
    made = "\n".join(f"{'page' if option == 'html' else option}: {path}" for option, path, _ in files)
    print_result(as_json, result, lambda: f"{tables.compared(compared, missing)}\n\n{made}")
