"""Writes the page of `retort compare` from the stored strips of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.data import pictures
from stages.evaluate import figures
from stages.reports.chart import chart
from stages.reports.sections import Section

if TYPE_CHECKING:
    from PIL import Image


def page(sections: Sequence[Section], remarks: Sequence[str]) -> str:
    """Return a self-contained HTML page, with `remarks` at the top. Raises OSError if a strip cannot be read."""
    return pictures.page("comparison.html", remarks=remarks, sections=list(map(_section, sections)))


def figure(section: Section, columns: int) -> Image.Image:
    """Draw a section's images, at most `columns` of each row. Raises OSError if a strip cannot be read."""
    return pictures.figure(_images(section, columns), section.shown["prompts"][:columns])


def _section(section: Section) -> dict[str, Any]:
    drawn = chart(section.rows)
    return {
        "title": section.title,
        "images": pictures.table(_images(section), section.shown["prompts"]),
        "chart": pictures.as_svg(drawn) if drawn else "",
        "figures": figures.table([(row.kind, row.name, row.note, row.figures) for row in section.rows]),
        "legend": section.legend,
    }


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
