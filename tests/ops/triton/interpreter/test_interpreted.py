"""The kernels against the float64 reference, without a GPU: the contract's tests in Triton's interpreter.

Whether functions are interpreted is decided when Triton is imported, so the tests run in processes of their own, over
a part of the table: an interpreted operator takes a tenth of a second.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
CONTRACT = "tests/ops/test_contract.py"

# Small cases, because the emulator runs the compiled kernels over a larger part of the table.
_CASES = "3x5x7x7 or 4x6x5x5-float32-sliced or 4x3x16x16-float32-channels_last"
# Eager computes float64, and the last two test other implementations.
_LEFT_OUT = "float64 or keep_the_strides or threads"

PARTS = {
    "operators": f"(train_forward or normalize_and or the_halves or test_weights or test_index) and ({_CASES})",
    "edges": "empty_group or fully_masked or constant_channel or nonfinite or empty_batch or in_triton",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("part", PARTS)
def test_the_interpreted_kernels_fulfil_the_contract(part: str) -> None:
    selected = f"({PARTS[part]}) and not ({_LEFT_OUT})"
    files = [CONTRACT, *(["tests/ops/triton/interpreter/interpreted.py"] if part == "edges" else [])]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *files],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
