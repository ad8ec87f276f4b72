"""Settings for tests of JAX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def unoptimized_by_xla() -> Iterator[None]:
    """XLA compiles without optimization, in half the time. It is for tests of which values are computed, and when."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
