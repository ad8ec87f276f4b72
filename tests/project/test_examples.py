"""The examples run, each as the only process of its group."""

from __future__ import annotations

import gzip
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.keras.backends import UNOPTIMIZED
from tests.project.missing import HIDE

EXAMPLES = Path(__file__).parents[2] / "examples"
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


# Runs the example with its own images, and reads those in a folder.
KERAS_MNIST = """
import pathlib, runpy, sys
example = runpy.run_path(sys.argv[1])
example["main"](["--epochs", "1", "--batch-size", "1000", "--lr", "0.05"])
for name, values in example["read"](pathlib.Path(sys.argv[2])).items():
    print(name, values.shape, values.dtype, values.max())
"""


def write_mnist(folder: Path) -> None:
    """Write the four files of MNIST, with a few images each."""
    for part, images in {"train": 6, "t10k": 4}.items():
        header = bytes([0, 0, 8, 3, 0, 0, 0, images, 0, 0, 0, 28, 0, 0, 0, 28])
        files = {
            "images-idx3": header + bytes([255]) * (28 * 28 * images),
            "labels-idx1": bytes([0, 0, 8, 1, 0, 0, 0, images]) + bytes(range(images)),
        }
        for name, content in files.items():
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def test_the_example_for_keras_prints_without_torch(tmp_path: Path) -> None:
    if not all(map(find_spec, ("jax", "keras"))):
        pytest.skip("JAX or Keras is not installed")
    name = "keras_mnist.py"
    write_mnist(tmp_path)
    # a process of its own, because Keras keeps its backend
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": UNOPTIMIZED}
    command = [sys.executable, "-c", HIDE.format(missing=["torch"]) + KERAS_MNIST, EXAMPLES / name, tmp_path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert PRINTED[name] in run.stdout, run.stderr
    assert run.stdout.endswith(
        "x_train (6, 28, 28) float32 1.0\ny_train (6,) uint8 5\nx_test (4, 28, 28) float32 1.0\ny_test (4,) uint8 3\n"
    )
