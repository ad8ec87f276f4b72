"""The layer on each backend: its own cases, Keras's tests, and the examples in docstrings."""

from __future__ import annotations

import pytest

from tests.keras.backends import BACKENDS, run_cases


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_on_backend(backend: str) -> None:
    cases = ("keras_own.py", "numerics.py", "behaviour.py", "synchronized.py")
    run_cases(backend, *cases, "src/batchnorm/keras/layer.py")
