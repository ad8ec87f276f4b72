"""Checks after every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.doctor.watching.training import left_behind


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = left_behind()
    yield
    assert left_behind() == before
