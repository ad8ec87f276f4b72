"""Write the pages of the documentation's section "Learn" as notebooks, next to the pages.

    python scripts/notebooks.py

A block of Python becomes a cell, and the block of text after it becomes the cell's output.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_output

FOLDER = Path(__file__).parents[1] / "docs" / "learn"
OUTPUT = re.compile(r"\A```text\n(.*?)^```\n*", re.MULTILINE | re.DOTALL)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def pages() -> list[Path]:
    """Return the pages that have Python blocks."""
    return [page for page in sorted(FOLDER.glob("*.md")) if "```python" in page.read_text()]


def notebook(page: Path) -> NotebookNode:
    """Return a page as a notebook, with links to the other notebooks instead of their pages."""
    source = re.sub(r"(?<=\]\()([\w-]+)\.md", r"\1.ipynb", page.read_text())
    made = jupytext.reads(source, fmt="md")
    made.metadata = nbformat.from_dict(METADATA)
    for cell, after in pairwise(made.cells):
        if cell.cell_type == "code" and (output := OUTPUT.match(after.source)):
            cell.outputs = [new_output("stream", name="stdout", text=output[1])]
            after.source = after.source[output.end() :]
    made.cells = [cell for cell in made.cells if cell.source]
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(made)
    return made


def text(page: Path) -> str:
    """Return the content of a page's notebook file."""
    return nbformat.writes(notebook(page)) + "\n"


def main() -> None:
    """Write all notebooks."""
    for page in pages():
        page.with_suffix(".ipynb").write_text(text(page))


if __name__ == "__main__":
    main()
