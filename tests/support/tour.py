"""Makes docs/tour.ipynb, the notebook of docs/python.md, and runs it.

pip install nbclient ipykernel
python -m tests.support.tour
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from typing import Any

from tests.support.cli import ROOT

PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "tour.ipynb"


def cells() -> list[tuple[str, str]]:
    """Return (kind, text) of each cell: code for the page's blocks, with a cell for each paragraph of Python, and
    markdown between them. The first cell writes the manifest."""
    found = []
    parts = re.split(r"^```(\w+)\n(.*?)^```\n", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    for words, language, block in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        found.append(("markdown", words.strip()))
        blocks = block.strip().split("\n\n") if language == "python" else [f"%%writefile first.yaml\n{block}"]
        found += [("code", one.strip()) for one in blocks]
    return [*found, ("markdown", parts[-1].strip())]


def notebook() -> dict[str, Any]:
    """Return the notebook without outputs (nbformat 4.5)."""
    made = []
    for number, (kind, text) in enumerate(cells()):
        code = {"outputs": [], "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text, **code})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": made}


def main() -> None:
    import nbformat  # type: ignore[import-not-found]
    from nbclient import NotebookClient  # type: ignore[import-not-found]

    os.environ["PYTHONWARNINGS"] = "ignore"  # warnings name paths of this machine
    with tempfile.TemporaryDirectory() as folder:
        made = nbformat.from_dict(notebook())
        NotebookClient(made, resources={"metadata": {"path": folder}}).execute()
        text = json.dumps(made, indent=1, ensure_ascii=False).replace(folder, ".")
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
