"""A hook of mkdocs that inserts the table of activations where a page has `<!-- activations -->`."""

from __future__ import annotations

from typing import Any

from batchnorm.ops import ACTIVATIONS


def table() -> str:
    """Return the Markdown table of all activations."""
    rows = ["| name | f(z) | f′ jumps at |", "|---|---|---|"]
    for name, row in ACTIVATIONS.items():
        kinks = ", ".join(f"{kink:g}".replace("-", "−") for kink in row.kinks)
        rows.append(f"| `{name}` | {row.formula} | {kinks} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the table into the page."""
    return markdown.replace("<!-- activations -->", table())
