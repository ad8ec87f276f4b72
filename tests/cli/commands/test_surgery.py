"""The verbs `recalibrate`, `accelerate` and `standardize`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import batchnorm as bn
from batchnorm.cli.app import app
from tests.cli.commands.test_fold import write_onnx

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2))

def loader():
    torch.manual_seed(1)
    return [(torch.randn(8, 4, 7, 7), torch.zeros(8)) for _ in range(4)]

def breaks():
    yield from loader()
    raise OSError("disk gone")

def wide():
    return [torch.randn(8, 5, 7, 7)]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net_for_surgery.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("net_for_surgery", None)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), prog_name="batchnorm")


def assert_one_line(result: Result, text: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


@contextmanager
def full_disk(room: int = 500) -> Iterator[None]:
    """Files of this process end after so many bytes: the write that goes beyond fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    before, writes_none = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    sys.dont_write_bytecode = True  # otherwise, modules that are imported here have incomplete files for later runs
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_none
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# recalibrate


def test_a_network_is_recalibrated(folder: Path) -> None:
    words = ("recalibrate", "net_for_surgery:build", "--data", "net_for_surgery:loader")
    result = invoke(*words, "-o", "new.pth")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "recalibrate: 2 changed, 0 left; 32 samples in 4 batches, single pass"
    assert lines[-1] == "Written: new.pth"
    import net_for_surgery as net

    expected = bn.recalibrate(net.build(), net.loader()).model.state_dict()
    torch.testing.assert_close(torch.load("new.pth", weights_only=True), expected)
    assert invoke(*words, "--weights", "new.pth", "--only", "1", "--prior", 9, "-o", "again.pth").exit_code == 0
    again, _ = bn.recalibrate(net.build(), net.loader())
    again, _ = bn.recalibrate(again, net.loader(), only="1", prior=9)
    torch.testing.assert_close(torch.load("again.pth", weights_only=True), again.state_dict())


def test_arrays_of_a_file_are_data_too(folder: Path) -> None:
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(20, 4, 7, 7)).astype(np.float32))
    words = ("--batch-size", 5, "--passes", "sequential", "--max-samples", 10, "-o", "new.pth")
    result = invoke("recalibrate", "net_for_surgery:build", "--data", "data.npz", *words)
    assert result.exit_code == 0, result.output
    assert "10 samples in 2 batches, sequential passes" in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--data", "net_for_surgery:breaks"], "the model could not be run on the data: OSError: disk gone"),
        (["--data", "net_for_surgery:wide"], "to have 4 channels, but got 5"),
        (["--data", "net_for_surgery:loader", "--only", "7"], "which matches none of 2. Choose from: 1, 4"),
        (["--data", "none.npz"], "none.npz must be a file of numpy.savez, but reading it failed"),
        (["--data", "net_for_surgery:loader", "-o", "none/new.pth"], "must be in a directory that exists"),
        ([], "Missing option '--data'"),
    ],
)
def test_a_usage_error_leaves_the_existing_file(folder: Path, words: list[str], text: str) -> None:
    (folder / "new.pth").write_text("earlier")
    words = [*words] if "-o" in words else [*words, "-o", "new.pth"]
    assert_one_line(invoke("recalibrate", "net_for_surgery:build", *words, "--overwrite"), text)
    assert (folder / "new.pth").read_text() == "earlier"
    assert {path.suffix for path in folder.iterdir()} <= {".pth", ".py", ""}
    assert not list(folder.glob(".batchnorm-*"))


# accelerate


def test_changes_of_accelerate_are_printed(folder: Path) -> None:
    result = invoke("accelerate", "net_for_surgery:build", "--input", "2,4,7,7")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "accelerate: 2 changed, 0 left, 1 fused with following operations; outputs differ by "
    )
    assert invoke("accelerate", "net_for_surgery:build").exit_code == 0
    assert_one_line(
        invoke("accelerate", "net_for_surgery:build", "--input", "2,4,99999999999999,7"), "fits into memory"
    )
    text = "accelerate expects example_inputs that Sequential takes, got a tensor [2, 5, 7, 7]"
    assert_one_line(invoke("accelerate", "net_for_surgery:build", "--input", "2,5,7,7"), text)


def test_accelerate_measures_on_request(folder: Path) -> None:
    result = invoke("accelerate", "net_for_surgery:build", "--input", "2,4,7,7", "--measure", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert bool(report["changed"]) == (report["speedup"] > 1)
    assert_one_line(invoke("accelerate", "net_for_surgery:build", "--measure"), "--measure requires --input, got none")


# standardize


def test_a_file_is_only_shifted_or_scaled_on_request(folder: Path) -> None:
    x = np.random.default_rng(0).normal(5, 3, (50, 3))
    np.save("x.npy", x)
    assert invoke("standardize", "x.npy", "--without-mean", "-o", "scaled.npy").exit_code == 0
    assert invoke("standardize", "x.npy", "--without-std", "-o", "shifted.npy").exit_code == 0
    np.testing.assert_allclose(np.load("scaled.npy"), x / x.std(0), rtol=1e-12)
    np.testing.assert_allclose(np.load("shifted.npy"), x - x.mean(0), rtol=0, atol=1e-12)


def test_a_file_is_standardized_like_another(folder: Path) -> None:
    generator = np.random.default_rng(0)
    train = generator.normal(5, 3, (300, 12)).astype(np.float32)
    np.save("train.npy", train)
    np.save("test.npy", generator.normal(5, 3, (7, 12)).astype(np.float32))
    result = invoke("standardize", "train.npy", "-o", "done.npy")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "standardize: 300 samples of 12 features, float32"
    assert lines[3].split() == ["0", f"{train[:, 0].mean(dtype=float):.6g}", f"{train[:, 0].std(dtype=float):.6g}"]
    assert lines[-3:] == ["    ... and 2 more", "", "Written: done.npy"]
    done, fitted = np.load("done.npy"), bn.Standardizer().fit(train)
    np.testing.assert_array_equal(done, fitted.transform(train))
    assert invoke("standardize", "test.npy", "--like", "train.npy", "-o", "test-done.npy").exit_code == 0
    np.testing.assert_array_equal(np.load("test-done.npy"), fitted.transform(np.load("test.npy")))


def test_images_of_whole_numbers_with_channels_last(folder: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)
    np.save("images.npy", np.asfortranarray(images))
    assert invoke("standardize", "images.npy", "--channel-axis", -1, "-o", "done.npy").exit_code == 0
    done = np.load("done.npy")
    assert (done.dtype, done.shape) == (np.float64, images.shape)
    np.testing.assert_allclose(done, bn.Standardizer(channel_axis=-1).fit_transform(images), rtol=1e-12)


def test_wrong_data_are_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((50, 3))
    np.save("x.npy", x)
    x[-1] = np.nan
    np.save("nan.npy", x)
    np.savez("several.npz", x=x)
    (folder / "done.npy").write_text("earlier")
    monkeypatch.setattr(sys.modules["batchnorm.cli.commands.standardize"], "_BYTES", 24)
    for words, text in {
        ("nan.npy", "--nan-policy", "raise"): "Standardizer expects finite values, got NaN",
        (
            "nan.npy",
            "--nan-policy",
            "raise",
            "--like",
            "x.npy",
        ): "batchnorm standardize: Standardizer expects finite values, got NaN",
        ("several.npz",): "several.npz must hold one array",
        ("none.npy",): "none.npy must be a file of numpy.save, but reading it failed",
        ("x.npy", "--channel-axis", 2): "with features on axis 2",
    }.items():
        assert_one_line(invoke("standardize", *words, "-o", "done.npy", "--overwrite"), text)
        assert (folder / "done.npy").read_text() == "earlier"
    assert_one_line(invoke("standardize", "x.npy", "-o", "done.npy"), "done.npy must not exist yet")
    result = invoke("standardize", "nan.npy", "-o", "kept.npy")
    assert "3 values are NaN: excluded from the statistics, and kept" in result.stdout
    assert np.isnan(np.load("kept.npy")).sum() == 3
    np.save("one-nan.npy", np.array([[1.0], [np.nan]]))
    result = invoke("standardize", "one-nan.npy", "-o", "kept-one.npy")
    assert "2 samples of 1 feature," in result.stdout
    assert "1 value is NaN: excluded" in result.stdout
    assert not list(folder.glob(".batchnorm-*"))


# A full disk


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("output", ["f.pth", "f.pt2", "f.onnx", "recalibrated.pth", "done.npy"])
def test_a_disk_that_is_full_in_the_middle_leaves_what_was_there(folder: Path, output: str, existing: bool) -> None:
    np.save("x.npy", np.random.default_rng(0).normal(size=(100, 4)))
    words = ["fold", "net_for_surgery:build", "--input", "2,4,7,7"]
    if output.endswith(".onnx"):
        write_onnx(folder / "net.onnx")
        words = ["fold", "net.onnx", "--input", "1,3,8,8"]
    elif output == "recalibrated.pth":
        words = ["recalibrate", "net_for_surgery:build", "--data", "net_for_surgery:loader"]
    elif output == "done.npy":
        words = ["standardize", "x.npy"]
    if existing:
        (folder / output).write_text("earlier")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with full_disk():
        result = invoke(*words, "-o", output, *["--overwrite"] * existing)
    assert_one_line(result, f"{output} could not be written: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert {path.name for path in folder.iterdir() if path.is_dir()} <= {"__pycache__"}
    assert invoke(*words, "-o", output, "--overwrite").exit_code == 0
    assert (folder / output).stat().st_size > 500
