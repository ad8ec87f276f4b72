"""The compiled kernels against the float64 reference, without a GPU: the contract's tests in the emulator.

The emulator takes the place of the process's GPU, so the tests run in processes of their own, each case of the table
once. `make emulate` runs the whole table.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.implementations import SMALLER

ROOT = Path(__file__).parents[3]

# Cases that are large, that use eager, or that test what does not depend on the compiled code.
_LARGE = " or ".join(["x".join(map(str, shape)) for shape in SMALLER.values()] + ["offset-100", "offset-1e+06"])
_LEFT_OUT = f"{_LARGE} or float64 or strides or threads or half_parameters"
_CONTRACT, _LAUNCHES = "tests/ops/test_contract.py", "tests/ops/triton/emulated_launches.py"

PARTS = {
    "fused operators": (f"(train or normalize) and not ({_LEFT_OUT})", [_CONTRACT]),
    "halves": (f"not (train or normalize) and not ({_LEFT_OUT})", [_CONTRACT, _LAUNCHES]),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("part", PARTS)
def test_the_emulated_kernels_fulfil_the_contract(part: str) -> None:
    selected, files = PARTS[part]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected, *files],
        cwd=ROOT,
        env={**environment, "BATCHNORM_EMULATE": "sample", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
