"""A hook of mkdocs that shows CONTRIBUTING.md and RELEASING.md as pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
NAMES = ("CONTRIBUTING.md", "RELEASING.md")


def content(text: str) -> str:
    """Return the text with links that work in the folder of the documentation."""
    text = text.replace("](docs/", "](")
    text = re.sub(r"\]\(([A-Z]+\.md)\)", lambda link: f"]({link[1].lower()})", text)
    return re.sub(r"\[([^]]*)\]\((?:csrc|tests|src|\.ci)/[^)]*\)", r"\1", text)  # not part of the documentation


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name.lower(), content=content(text)))
    return files
