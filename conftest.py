"""Which files pytest searches for examples in docstrings."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Keras chooses its backend when it is imported. tests/keras runs these examples, once for each backend.
_KERAS = Path(__file__).parent / "src" / "batchnorm" / "keras"


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[Any], list[Any]]:
    """Drop the collectors of examples where there are none: each imports its module, in every worker."""
    collectors = yield
    if _KERAS not in file_path.parents and ">>>" in file_path.read_text(encoding="utf-8", errors="ignore"):
        return collectors
    return [collector for collector in collectors if type(collector) is pytest.Module]
