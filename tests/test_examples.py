"""The examples run, each as the only process of its group."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "keras_mnist.py": "learning rate 0.05, with BN\n  test accuracy: ",
    "recalibrate_under_torchrun.py": "rank 0: recalibrate: 2 changed, 0 left; 90 samples in 9 batches, single pass",
    "standardize_under_torchrun.py": "rank 0: mean [34.5 34.5 34.5], 4480 values, FrozenBatchNorm2d(3",
    "standardize_with_dask.py": "standard deviations 1.000000000000 to 1.000000000000",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", [name for name in PRINTED if "keras" not in name])
def test_the_example_prints(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "dask" in name:
        pytest.importorskip("dask.array")
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out


def test_the_example_for_keras_prints() -> None:
    if find_spec("keras") is None:
        pytest.skip("Keras is not installed")
    name = "keras_mnist.py"
    environment = {**os.environ, "KERAS_BACKEND": "torch"}  # a process of its own, because it stays with its backend
    command = [sys.executable, EXAMPLES / name, "--epochs", "1", "--batch-size", "1000", "--lr", "0.05"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert PRINTED[name] in run.stdout, run.stderr
