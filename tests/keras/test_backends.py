"""The layer and the functions for models on each backend: cases, Keras's own tests, and the examples in docstrings."""

from __future__ import annotations

import pytest

from tests.keras.backends import BACKENDS, UNOPTIMIZED, run_cases

_VALUES = ("numerics.py", "synchronized.py")
_LAYER = ("keras_own.py", "behaviour.py", "src/batchnorm/keras/layer.py")
# Not NumPy: Keras finds shapes there by computing with uninitialized memory, which may warn of an overflow.
# The surgery does not depend on the backend.
_FUNCTIONS = {
    "torch": ("surgery", "folding", "joined", "recalibration", "doctor"),
    "tensorflow": ("folding", "recalibration", "doctor"),
    "jax": ("folding", "recalibration", "doctor"),
}
_MODULES = (
    "surgery/convert.py",
    "surgery/freeze.py",
    "surgery/fold/folding.py",
    "recalibration.py",
    "doctor/diagnosing.py",
)
# XLA optimizes where the values are compared with the reference, which takes a process of its own.
_WITH_XLA = ("jax", "tensorflow")


@pytest.mark.parametrize("backend", _WITH_XLA)
def test_values_on_backend(backend: str) -> None:
    run_cases(backend, *_VALUES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_and_functions_on_backend(backend: str) -> None:
    cases = list(_LAYER if backend in _WITH_XLA else (*_VALUES, *_LAYER))
    if backend in _FUNCTIONS:
        cases += [f"tests/keras/verbs/{case}.py" for case in _FUNCTIONS[backend]]
        cases += [f"src/batchnorm/keras/{module}" for module in _MODULES]
    else:
        cases.append("tests/keras/verbs/without_torch.py")
    # Nothing needs PyTorch on another backend: there, it cannot be imported.
    plugins = () if backend == "torch" else ("tests.keras.no_torch",)
    run_cases(backend, *cases, plugins=plugins, xla_flags=UNOPTIMIZED)
