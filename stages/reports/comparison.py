"""Writes the page of `retort compare` from the stored strips of images."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data import pictures
from stages.evaluate import figures
from stages.reports.chart import as_svg, chart
from stages.reports.sections import Row, Section

if TYPE_CHECKING:
    from PIL import Image

STYLE = """
.chart { background: white } .chart svg { max-width: 100%; height: auto }
.legend p { margin: .2rem 0; color: var(--faint); font-size: .8rem }
.figures td, .figures th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
.figures td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.figures th { position: sticky; left: 0; z-index: 1; background: Canvas } .figures tbody th { min-width: 10rem }
.figures thead th { top: 0; z-index: 2; text-align: right; font-size: .8rem; vertical-align: bottom }
.figures thead th:first-child { z-index: 3 }
.figures .teacher > *, .figures .reference > * { background: var(--band) }
.figures .mean > * { font-style: italic; font-weight: 600 }
"""


def page(sections: Sequence[Section], remarks: Sequence[str]) -> str:
    """Return a self-contained HTML page, with `remarks` at the top. Raises OSError if a strip cannot be read."""
    notes = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Retort: students compared</title><style>{pictures.STYLE}{STYLE}</style></head>
<body><h1>Students compared</h1>
<p>Each column shows one noise and one prompt, the same in all rows of a section.</p>{notes}
{"".join(map(_section, sections))}
</body></html>
"""


def figure(section: Section, columns: int) -> Image.Image:
    """Draw a section's images, at most `columns` of each row. Raises OSError if a strip cannot be read."""
    return pictures.figure(_images(section, columns), section.shown["prompts"][:columns])


def _section(section: Section) -> str:
    images = pictures.table(_images(section), section.shown["prompts"])
    legend = "".join(f"<p>{html.escape(line)}</p>" for line in section.legend)
    drawn = chart(section.rows)
    graph = f'<div class="chart">{as_svg(drawn)}</div>' if drawn else ""
    return (
        f"<section><h2>{html.escape(section.title)}</h2>\n{images}{graph}{_figures(section.rows)}\n"
        f'<div class="legend">{legend}</div></section>\n'
    )


def _images(section: Section, columns: int | None = None) -> list[pictures.Row]:
    """Return label and first `columns` images of each row that has images. The label has lines for name, note and
    network calls."""
    from PIL import Image

    found = []
    for row in section.rows:
        if row.picture:
            label = "\n".join(filter(None, (row.name, row.note, figures.calls(row.figures))))
            with Image.open(row.picture) as strip:
                found.append((label, pictures.cut(strip, len(section.shown["prompts"]))[:columns]))
    return found


def _figures(rows: Sequence[Row]) -> str:
    shown = figures.columns(row.figures for row in rows)
    head = "".join(f'<th scope="col">{html.escape(figures.FIGURES[key].title)}</th>' for key in shown)
    body = "".join(
        f'<tr class="{row.kind}"><th scope="row">{_name(row)}</th>{"".join(_cell(row, key) for key in shown)}</tr>\n'
        for row in rows
    )
    return f'<table class="figures"><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _name(row: Row) -> str:
    return html.escape(row.name) + (f"<small>{html.escape(row.note)}</small>" if row.note else "")


def _cell(row: Row, key: str) -> str:
    figure, spread = (html.escape(text) for text in figures.words(row.figures, key))
    return f"<td>{figure}{f' <small>{spread}</small>' if spread else ''}</td>"
