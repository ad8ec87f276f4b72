"""The functions for models on each backend: their cases, and the examples in docstrings."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.keras.backends import UNOPTIMIZED, run_cases

# Not NumPy: Keras finds shapes there by computing with uninitialized memory, which may warn of an overflow.
# The surgery does not depend on the backend.
_CASES = {
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


@pytest.mark.parametrize("backend", _CASES)
def test_verbs_on_backend(backend: str) -> None:
    cases = [f"tests/keras/verbs/{case}.py" for case in _CASES[backend]]
    modules = [f"src/batchnorm/keras/{module}" for module in _MODULES]
    # No function needs PyTorch on another backend: there, it cannot be imported.
    plugins = () if backend == "torch" else ("tests.keras.no_torch",)
    run_cases(backend, *cases, *modules, plugins=plugins, xla_flags=UNOPTIMIZED)


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_verbs_work_without_torch() -> None:
    program = Path(__file__).parent / "verbs" / "without_torch.py"
    environment = {**os.environ, "KERAS_BACKEND": "numpy", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
