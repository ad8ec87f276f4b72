"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Cells = Sequence[str]


def markdown(head: Cells, body: Iterable[Cells], numbers_from: int = 1) -> str:
    """Return a table; columns from `numbers_from` on are right-aligned."""
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    lines = [head, rule, *([c.replace("|", "\\|") for c in row] for row in body)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def milliseconds(value: str | float) -> str:
    return f"{float(value):.3g}"
