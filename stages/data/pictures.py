"""Arranges images for viewing: strips, HTML pages, and figures with labels."""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Sequence
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late at run time, so that commands start fast
    import numpy as np
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image, ImageFont

    Row = tuple[str, list[Image.Image]]
    """A label, and one image for each column, all of one size. Lines after the label's first are notes."""

IN_PAGE, IN_FIGURE = 64, 96
"""Minimum width of an image in pixels. A smaller image is enlarged by an integer factor, without smoothing."""
MARGIN, GUTTER, LEADING, LABEL, LARGE, SMALL = 16, 6, 17, 190, 15, 12
"""Sizes in a figure, in pixels: border, space between images, line height, maximum width of a label, font size of
labels, font size of captions. They are scaled up for images wider than GROWS."""
GROWS = 192
LINES = 6
"""Maximum number of lines of a caption, and of a wrapped line of a label."""
PAPER, INK, FAINT = "#ffffff", "#1f1f1f", "#6b6b6b"


def strip(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Put images (N, 3, H, W) in [-1, 1] side by side: (H, N * W, 3), in 0 to 255."""
    import numpy as np

    levels = ((images + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8)
    return np.concatenate(levels.transpose(0, 2, 3, 1), axis=1)


def cut(strip: Image.Image, columns: int) -> list[Image.Image]:
    """Cut a strip into its `columns` images."""
    width = strip.width // columns
    return [strip.crop((width * i, 0, width * (i + 1), strip.height)) for i in range(columns)]


def data_url(image: Image.Image) -> str:
    """Encode an image as a PNG in a data URL, so that the page needs no other file."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def table(rows: Sequence[Row], captions: Sequence[str]) -> dict[str, Any]:
    """Return the images of a page, for the macro `images` of the templates: a label to the left of each row, and a
    caption above each column."""
    cells = [(*label.partition("\n")[::2], list(map(data_url, images))) for label, images in rows]
    return {"width": _wide(rows[0][1][0], IN_PAGE), "captions": captions, "rows": cells}


def page(template: str, **values: Any) -> str:
    """Return the self-contained HTML page of a template in templates/. All texts are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("stages.data")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(values)


def as_svg(figure: Figure) -> Markup:
    """Return a chart as an SVG element for an HTML page. Its text stays text and is not drawn as paths."""
    from markupsafe import Markup
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "retort"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()[file.getvalue().index("<svg") :]
    # an SVG element in HTML needs no metadata and no XML namespaces
    return Markup(re.sub(r'<metadata>.*?</metadata>|xmlns(:\w+)?="[^"]*"', "", text, flags=re.DOTALL))


def figure(rows: Sequence[Row], captions: Sequence[str]) -> Image.Image:
    """Draw the rows of `table` as one image on white, in the font that is included in Pillow (ASCII only)."""
    from PIL import Image, ImageDraw, ImageFont

    one = rows[0][1][0]
    width = _wide(one, IN_FIGURE)
    height = width // one.width * one.height
    unit = max(1.0, width / GROWS)
    margin, gutter, leading, widest = (round(unit * pixels) for pixels in (MARGIN, GUTTER, LEADING, LABEL))
    large, small = (ImageFont.load_default(unit * size) for size in (LARGE, SMALL))
    above = [_wrapped(text, small, width) for text in captions]
    labels = [
        [
            (text, FAINT if n else INK)
            for n, line in enumerate(label.split("\n"))
            for text in _wrapped(line, large, widest)
        ]
        for label, _ in rows
    ]
    left = margin + int(max(large.getlength(line) for label in labels for line, _ in label)) + 3 * gutter
    top = margin + leading * max(map(len, above)) + gutter
    across, down = width + gutter, max(height, leading * max(map(len, labels))) + gutter
    size = (left + across * len(captions) - gutter + margin, top + down * len(rows) - gutter + margin)
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    for column, lines in enumerate(above):
        for n, line in enumerate(reversed(lines), 1):
            place = (left + across * column + width / 2, top - gutter - leading * n)
            draw.text(place, line, FAINT, small, anchor="ma")
    for row, (label, (_, images)) in enumerate(zip(labels, rows, strict=True)):
        y = top + down * row
        for n, (line, ink) in enumerate(label):
            draw.text((margin, y + (down - gutter - leading * len(label)) / 2 + leading * n), line, ink, large)
        for column, image in enumerate(images):
            paper.paste(image.resize((width, height), Image.Resampling.NEAREST), (left + across * column, y))
    return paper


def _wide(image: Image.Image, least: int) -> int:
    """Return the width to draw an image at: the smallest multiple of its own width that is at least `least` pixels."""
    return -(-least // image.width) * image.width


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Wrap text to at most LINES lines, each at most `width` pixels wide."""
    for characters in range(max(1, min(len(text), width)), 0, -1):
        lines = textwrap.wrap(text, characters, max_lines=LINES, placeholder="…")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
