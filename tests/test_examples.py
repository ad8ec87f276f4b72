"""The examples run, each as the only process of its group."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "recalibrate_under_torchrun.py": "rank 0: recalibrate: 2 changed, 0 left; 90 samples in 9 batches, single pass",
    "standardize_under_torchrun.py": "rank 0: mean [34.5 34.5 34.5], 4480 values, FrozenBatchNorm2d(3",
    "standardize_with_dask.py": "standard deviations 1.000000000000 to 1.000000000000",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_prints(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "dask" in name:
        pytest.importorskip("dask.array")
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out
