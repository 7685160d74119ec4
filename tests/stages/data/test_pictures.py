"""Images for viewing: the figure and the table of `stages.data.pictures`."""

import base64
import re
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from stages.data.pictures import cut, figure, page, strip, table

CAPTIONS = ["a red cat", "a caption that is far too long for one line of a column", ""]
PAPER = (255, 255, 255)


def noise(columns=3, width=32, height=32, seed=0):
    """Return images of noise. No pixel is as light as the paper."""
    pixels = np.random.default_rng(seed).integers(0, 200, (height, columns * width, 3), np.uint8)
    return cut(Image.fromarray(pixels), columns)


ROWS = [("teacher, 20 steps\n40 network calls", noise(seed=1)), ("student", noise(seed=2))]


def places(drawn, image, factor):
    """Return (x, y) of each place where an image was drawn enlarged and otherwise unchanged."""
    wanted = np.asarray(image).repeat(factor, 0).repeat(factor, 1)
    height, width = wanted.shape[:2]
    corners = np.argwhere((drawn[: 1 - height or None, : 1 - width or None] == wanted[0, 0]).all(-1))
    return [(x, y) for y, x in corners.tolist() if np.array_equal(drawn[y : y + height, x : x + width], wanted)]


def test_a_strip_can_be_cut_into_its_images_again():
    images = np.linspace(-1.2, 1.2, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    whole = strip(images)
    assert whole.shape == (4, 10, 3) and (whole.min(), whole.max()) == (0, 255)
    parts = [np.asarray(part) for part in cut(Image.fromarray(whole), 2)]
    assert (np.concatenate(parts, axis=1) == whole).all() and parts[0].shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("width", "height", "factor"), [(16, 16, 6), (32, 32, 3), (40, 20, 3), (96, 48, 1), (128, 128, 1)]
)
def test_a_figure_holds_each_image_enlarged_at_its_place_with_paper_between(width, height, factor):
    rows = [(label, noise(3, width, height, seed)) for seed, (label, _) in enumerate(ROWS)]
    drawn = np.asarray(figure(rows, CAPTIONS))
    found = [[places(drawn, image, factor) for image in images] for _, images in rows]
    assert all(len(spots) == 1 for row in found for spots in row)
    grid = np.array([[spots[0] for spots in row] for row in found])  # (rows, columns, x and y)
    assert (grid[:, :, 0] == grid[0, :, 0]).all() and (grid[:, :, 1] == grid[:, :1, 1]).all()
    left, top = grid[0, 0]
    for one, other in pairwise(grid[0, :, 0]):
        assert 0 < other - one - width * factor < width and (drawn[top:, one + width * factor : other] == PAPER).all()
    one, other = grid[:, 0, 1]
    assert other > one + height * factor and (drawn[one + height * factor : other, left:] == PAPER).all()


def test_a_figure_has_labels_at_the_left_and_captions_on_top():
    drawn = np.asarray(figure(ROWS, CAPTIONS))
    inked = (drawn != PAPER).any(-1)
    (left, top), (_, below) = places(drawn, ROWS[0][1][0], 3)[0], places(drawn, ROWS[1][1][0], 3)[0]
    columns = [places(drawn, image, 3)[0][0] for image in ROWS[0][1]]
    above = [inked[:top, x : x + 96] for x in columns]
    assert above[0].any() and above[1].any() and not above[2].any()
    assert np.argmax(above[1].any(1)) < np.argmax(above[0].any(1))  # of more lines, and so higher
    assert (
        inked[top : top + 96, :left].sum() > inked[below : below + 96, :left].sum() > 0
    )  # a caption of two lines, and one of one line
    assert not inked[:top, :left].any() and not inked[top:, columns[1] - 6 : columns[1]].any()
    assert not np.asarray(inked)[:, [0, -1]].any() and not inked[[0, -1]].any()


def test_no_text_overlaps_an_image_or_another_column():
    endless = "x" * 400
    drawn = np.asarray(figure([(endless, noise())], [endless, "", ""]))
    x, y = places(drawn, noise()[0], 3)[0]
    assert drawn.shape[1] < 600 and (drawn[:y, x + 96 :] == PAPER).all()


def test_a_figure_without_captions_and_with_tall_labels():
    lines = "\n".join(["a line"] * 9)
    drawn = np.asarray(figure([(lines, noise(2, 96, 24)), (lines, noise(2, 96, 24, seed=1))], ["", ""]))
    assert places(drawn, noise(2, 96, 24, seed=1)[1], 1)[0][1] > 9 * 15
    assert places(drawn, noise(2, 96, 24)[0], 1)[0][1] < 30


def test_a_table_holds_each_image_as_it_is_with_labels_and_captions_escaped():
    rows = [("a <b>\nnote & note", noise(3, 48)), ("student", noise(3, 48, seed=1))]
    section = {"images": table(rows, ["<i>", "x & y", 'say "x"']), "figures": {"titles": [], "rows": []}}
    text = page("comparison.html", remarks=[], sections=[{"title": "", "chart": "", "legend": [], **section}])
    files = re.findall(r'alt="([^"]*)" width="96" src="data:image/png;base64,([^"]*)"', text)
    escaped = ["&lt;i&gt;", "x &amp; y", "say &#34;x&#34;"]
    assert [alt for alt, _ in files] == [f"{name}: {text}" for name in ("a &lt;b&gt;", "student") for text in escaped]
    for (_, content), image in zip(files, [image for _, images in rows for image in images], strict=True):
        assert (np.asarray(Image.open(BytesIO(base64.b64decode(content)))) == np.asarray(image)).all()
    assert '<th scope="row">a &lt;b&gt;<small>note &amp; note</small></th>' in text and text.count("<small>") == 1
