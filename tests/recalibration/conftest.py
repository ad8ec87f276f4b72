"""Checks after every test of this folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "recalibrate"]
