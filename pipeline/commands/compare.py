"""The command `retort compare`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.console import find_run, json_option, print_result, store_option
from pipeline.reference.completion import complete_runs_or_paths


@click.command(short_help="Put students beside their teacher.")
@click.argument("run_names", metavar="[RUN]...", nargs=-1, shell_complete=complete_runs_or_paths)
@store_option
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("compare.html"),
    show_default=True,
    help="Where to write the page.",
)
@json_option
def compare(run_names: tuple[str, ...], store: str | None, html: Path, as_json: bool) -> None:
    """Compare the students of RUNs with their teacher: a table, and a page of images from the same noise.

    Students that were evaluated with the same teacher, noises and prompts make one section, whichever run they are of.
    """
    from pipeline.errors import UsageError
    from pipeline.views import tables
    from pipeline.views.compare import collect, remarks
    from stages.reports.comparison import page
    from stages.reports.sections import sections

    runs = [find_run(name, store) for name in dict.fromkeys(run_names or (None,))]
    evaluations, not_made = collect(runs)
    compared, missing = sections(evaluations), remarks(not_made)
    try:
        html.write_text(page(compared, missing), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {html} cannot be written: {error.strerror}") from None
    result = {
        "sections": [section.as_dict() for section in compared],
        "not_made": [one.as_dict() for one in not_made],
        "page": str(html),
    }
    print_result(as_json, result, lambda: "\n\n".join([tables.compared(compared, missing), f"page: {html}"]))
