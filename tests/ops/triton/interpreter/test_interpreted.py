"""The kernels against the float64 reference, without a GPU: the contract's tests in Triton's interpreter.

Whether functions are interpreted is decided when Triton is imported, so the tests run in a process of their own, over
a small part of the table: an interpreted operator takes a tenth of a second.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
FILES = ["tests/ops/test_contract.py", "tests/ops/triton/interpreter/interpreted.py"]

# The emulator runs the compiled kernels over the contract's table, without the cases that are too large for it, such as
# those far from zero. Eager computes float64.
_FAR = "train_forward and 4x3x16x16-float32 and (offset-100 or offset-1e+06)"
_EDGES = "empty_group or fully_masked or constant_channel or nonfinite or empty_batch or in_triton"
SELECTED = f"({_EDGES} or ({_FAR})) and not (float64 or keep_the_strides or threads)"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_the_interpreted_kernels_fulfil_the_contract() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED, *FILES],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
