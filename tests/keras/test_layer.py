"""The layer on each backend: its own cases, Keras's tests, and the examples in docstrings."""

from __future__ import annotations

import pytest

from tests.keras.backends import BACKENDS, run_cases


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_on_backend(backend: str) -> None:
    run_cases(backend, "keras_own.py", "src/batchnorm/keras/layer.py")
