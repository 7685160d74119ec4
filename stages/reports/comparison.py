"""Writes the page of `retort compare` from the stored strips of images."""

from __future__ import annotations

import html
from collections.abc import Sequence

from stages.data.pictures import data_url
from stages.evaluate import figures
from stages.reports.chart import STYLE as CHART_STYLE
from stages.reports.chart import chart
from stages.reports.sections import Row, Section

ZOOM = 64
"""Pixels that an image is drawn wide, at least, and always a whole multiple of its own."""

STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, CanvasText 60%, Canvas);
  --line: color-mix(in srgb, CanvasText 20%, Canvas); --band: color-mix(in srgb, CanvasText 6%, Canvas) }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; background: Canvas; color: CanvasText }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem } p, h2 { max-width: 60rem }
small, .legend, .prompts td { color: var(--faint); font-size: .8rem } small { display: block; font-weight: 400 }
.legend p { margin: .2rem 0 } table { border-spacing: 0; margin: 1rem 0 }
th { text-align: left; font-weight: 500; overflow-wrap: anywhere; background: Canvas }
th[scope=row] { position: sticky; left: 0; z-index: 1; padding: 2px 1rem 2px 0 }

/* the full teacher stays at the top, prompts at the bottom, names at the left */
.images { table-layout: fixed } .images td { padding: 2px 0; line-height: 1.25; vertical-align: top }
.images img { display: block; width: 100%; image-rendering: pixelated }
.images tr:first-child > *, .images .prompts > * { position: sticky; z-index: 2; background: Canvas }
.images tr:first-child > th, .images .prompts > th { z-index: 3 }
.images tr:first-child > * { top: 0; border-bottom: 2px solid var(--line) } .images .prompts > * { bottom: 0 }
.prompts div { max-height: 5rem; overflow: hidden; padding: 4px 6px 0 0; font-size: .7rem; hyphens: auto;
  overflow-wrap: anywhere }

.figures td, .figures th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
.figures td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.figures td small { display: inline } .figures tbody th { min-width: 10rem }
.figures thead th { position: sticky; top: 0; z-index: 2; text-align: right; font-size: .8rem; vertical-align: bottom }
.figures thead th:first-child { left: 0; z-index: 3 }
.figures .teacher > *, .figures .reference > * { background: var(--band) }
.figures .mean > * { font-style: italic; font-weight: 600 }
"""


def page(sections: Sequence[Section], remarks: Sequence[str]) -> str:
    """One self-contained HTML page; `remarks` stand at its top. Raises OSError if a strip cannot be read."""
    notes = "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Retort: students compared</title><style>{STYLE}{CHART_STYLE}</style></head>
<body><h1>Students compared</h1>
<p>Every column is one noise and one prompt, the same in all rows of a section.</p>{notes}
{"".join(map(_section, sections))}
</body></html>
"""


def _section(section: Section) -> str:
    legend = "".join(f"<p>{html.escape(line)}</p>" for line in section.legend)
    return (
        f"<section><h2>{html.escape(section.title)}</h2>\n{_images(section)}\n{chart(section.rows)}{_figures(section.rows)}\n"
        f'<div class="legend">{legend}</div></section>\n'
    )


def _images(section: Section) -> str:
    """A strip a row, and the prompts under its columns."""
    prompts = section.shown["prompts"]
    strips = [(row, row.picture.read_bytes()) for row in section.rows if row.picture]
    width = _width(strips[0][1]) // len(prompts)
    width *= max(1, ZOOM // width)
    rows = "".join(
        f'<tr><th scope="row">{_name(row, calls=True)}</th><td colspan="{len(prompts)}">'
        f'<img alt="{html.escape(row.label)}" src="{data_url(strip)}"></td></tr>\n'
        for row, strip in strips
    )
    below = "".join(f'<td><div title="{html.escape(prompt)}">{html.escape(prompt)}</div></td>' for prompt in prompts)
    return (
        f'<table class="images" style="width: calc(15rem + {width * len(prompts)}px)">'
        f'<colgroup><col style="width: 15rem"><col span="{len(prompts)}" style="width: {width}px"></colgroup>\n'
        f'<tbody>{rows}<tr class="prompts"><th scope="row"></th>{below}</tr></tbody></table>'
    )


def _width(png: bytes) -> int:
    """Pixels, from the file's header."""
    return int.from_bytes(png[16:20], "big")


def _figures(rows: Sequence[Row]) -> str:
    shown = figures.columns(row.figures for row in rows)
    head = "".join(f'<th scope="col">{html.escape(figures.FIGURES[key].title)}</th>' for key in shown)
    body = "".join(
        f'<tr class="{row.kind}"><th scope="row">{_name(row)}</th>{"".join(_cell(row, key) for key in shown)}</tr>\n'
        for row in rows
    )
    return f'<table class="figures"><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _name(row: Row, calls: bool = False) -> str:
    count = figures.words(row.figures, "network_calls")[0] if calls else ""
    cost = f"{count} network call{'s' if count != '1' else ''}" if count else ""
    notes = "".join(f"<small>{html.escape(note)}</small>" for note in (row.note, cost) if note)
    return html.escape(row.name) + notes


def _cell(row: Row, key: str) -> str:
    figure, spread = (html.escape(text) for text in figures.words(row.figures, key))
    return f"<td>{figure}{f' <small>{spread}</small>' if spread else ''}</td>"
