"""The templates of pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import batchnorm

TEMPLATES = sorted(Path(batchnorm.__file__).parent.rglob("*.j2"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.parent.parent.parent.name)
def test_sentences_are_apart_although_blocks_are_trimmed(template: Path) -> None:
    # A line break after a block is removed, so the space after the sentence must stand inside the block.
    assert re.findall(r"\S+[.;:]\{% end\w+ %\}\n(?=\{%|\w)", template.read_text(encoding="utf-8")) == []
