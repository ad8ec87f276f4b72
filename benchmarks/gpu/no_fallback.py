"""A plugin of pytest: a test fails if a kernel falls back to plain torch operations in it."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from benchmarks.gpu.layers import fallback


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Compare the implementation before and after the test."""
    before = fallback()
    result = yield
    after = fallback()
    if after != before:
        pytest.fail(f"a kernel fell back in this test: {after}", pytrace=False)
    return result
