"""Fixtures of this folder's tests."""

from __future__ import annotations

import pytest

from batchnorm.standardize import data as data_module


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every array be read in several parts."""
    monkeypatch.setattr(data_module, "_PART", 24)
    monkeypatch.setattr(data_module, "_LARGE_PART", 24)
    monkeypatch.setattr(data_module, "_BLOCK", 72)
