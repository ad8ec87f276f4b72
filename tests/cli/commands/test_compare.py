from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from batchnorm.cli.app import app
from batchnorm.compare.inputs import norms
from batchnorm.compare.report import figures

SHORT = ["--steps", "4", "--seeds", "1", "--batch-size", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no pictures, which take longer than the training of small networks."""
    monkeypatch.setattr(figures, "draw", lambda *_: {})


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(48) % 3
    x = (labels[:, None] + generator.standard_normal((48, 4))).astype(np.float32)
    return {"x_train": x, "y_train": labels, "x_test": x, "y_test": labels}


@pytest.fixture
def file(arrays, tmp_path: Path) -> Path:
    np.savez(tmp_path / "mine.npz", **arrays)
    return tmp_path / "mine.npz"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, words)], prog_name="batchnorm")


def assert_one_line(result: Result, text: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.startswith("batchnorm compare: ")
    assert result.stderr.count("\n") == 1
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("norms", [["none", "batch"], ["none,batch"], ["none", "--norms", "batch"]])
def test_a_comparison_prints_headline_and_page(file, tmp_path, norms):
    result = invoke("--norms", *norms, "--data", file, "--out", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    *headline, blank, last = result.stdout.splitlines()
    assert len(headline) == 3
    assert blank == ""
    assert last == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert (tmp_path / "out" / "summary.json").is_file()
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["[1/2] none, seed 0", "[2/2] batch, seed 0"]


def test_the_default_directory_is_new_in_the_working_directory(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("--norms", "none", "--data", file, *SHORT)
    assert result.exit_code == 0, result.output
    (made,) = (tmp_path / "batchnorm-compare").iterdir()
    assert (made / "report.html").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_a_user_callable_and_every_option_reach_the_run(file, tmp_path, monkeypatch):
    (tmp_path / "net_for_cli.py").write_text(
        "from torch import nn\n"
        "def build(norm, in_shape, num_classes):\n"
        "    layers = nn.Linear(in_shape[0], 6), norm(6), nn.Tanh(), norm.dropout(), nn.Linear(6, num_classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.chdir(tmp_path)
    result = invoke(
        "--model", "net_for_cli:build", "--data", file, "--norms", "batch", "none", "--epochs", 2, "--batch-size", 16,
        24, "--sampling", "iid", "classes:2", "--placement", "before", "--input-norm", "--lr", 0.05, "--schedule",
        "cosine:warmup=2", "--optimizer", "adam", "--seeds", 1, "--dropout", 0.1, "--target-accuracy", 0.5,
        "--threads", 1, "--evaluate-every", 3, "--device", "cpu", "--records", "parquet", "--tensorboard",
        "--out", "there",
    )  # fmt: skip
    sys.modules.pop("net_for_cli", None)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "there" / "settings.json").read_text())["settings"]
    assert settings == {
        "grid": {
            "norm": ["batch", "none"], "placement": ["before"], "lr": [0.05], "batch_size": [16, 24],
            "sampling": ["iid", "classes:2"], "dropout": [0.1], "model": ["net_for_cli:build"],
        },
        "input_norm": True, "data": str(file), "data_dir": None, "epochs": 2,
        "steps": None, "schedule": "cosine:warmup=2", "optimizer": "adam", "seeds": 1, "target_accuracy": 0.5,
        "evaluate_every": 3, "threads": 1, "device": "cpu",
    }  # fmt: skip
    assert len(list((tmp_path / "there" / "runs").iterdir())) == 2 * 2 * 2
    assert (tmp_path / "there" / "steps.parquet").is_file()
    assert len(list((tmp_path / "there" / "tensorboard").iterdir())) == 8
    assert_one_line(invoke("--data", file, "--data-dir", tmp_path), "data_dir (--data-dir) requires data mnist")


def test_several_networks_are_compared_as_they_are_and_resumed(file, tmp_path, monkeypatch):
    layers = "nn.Linear(4, 6), {}nn.ReLU(), nn.Linear(6, 3)"
    (tmp_path / "nets_for_cli.py").write_text(
        "from torch import nn\n"
        f"def plain(): return nn.Sequential({layers.format('')})\n"
        f"def normalized(): return nn.Sequential({layers.format('nn.BatchNorm1d(6), ')})\n"
    )
    monkeypatch.chdir(tmp_path)
    result = invoke("--model", "nets_for_cli:plain", "nets_for_cli:normalized", "--data", file, "--out", "out", *SHORT)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "[1/2] plain, seed 0",
        "[2/2] normalized, seed 0",
    ]
    assert "with normalized and" in result.stdout
    more = invoke("--resume", "--out", "out", "--seeds", 2)
    assert [line.split(":")[0] for line in more.stderr.splitlines()] == [
        "[1/2] normalized, seed 1",
        "[2/2] plain, seed 1",
    ]
    sys.modules.pop("nets_for_cli", None)
    assert_one_line(
        invoke("--model", "nets_for_cli:plain", "mlp", "--data", file, "--out", "new", *SHORT),
        "norm 'as-is' needs finished networks, but mlp is built with a norm",
    )
    sys.modules.pop("nets_for_cli", None)
    assert not (tmp_path / "new").exists()


def test_an_unknown_norm_is_reported_with_the_closest_name(tmp_path):
    result = invoke("--norms", "none", "btach", "--out", tmp_path / "out")
    assert_one_line(result, f"norms must be among {', '.join(norms.names())}, got 'btach'. Did you mean batch?")


def test_batches_of_one_are_refused_before_training(file, tmp_path):
    result = invoke("--batch-size", "16", "1", "--data", file, "--out", tmp_path / "out", "--steps", "3")
    assert_one_line(
        result,
        "batch_size must give 'batch' in mlp more than one value per channel, got 1. Choose a larger one, or norms",
    )
    assert not (tmp_path / "out").exists()


def test_a_model_callable_that_raises_is_reported(tmp_path, monkeypatch):
    (tmp_path / "bad_net_for_cli.py").write_text(
        "def build(norm, in_shape, num_classes):\n    raise KeyError('width')\n"
    )
    monkeypatch.chdir(tmp_path)
    result = invoke("--model", "bad_net_for_cli:build", "--out", tmp_path / "out", *SHORT)
    sys.modules.pop("bad_net_for_cli", None)
    assert_one_line(result, "but raised KeyError: 'width' (bad_net_for_cli.py, line 2)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "index", "value", "text"),
    [
        ("y_test", 3, 9, "y_test must be among the 3 classes 0 to 2, got 9"),
        ("y_train", 3, -1, "y_train must not be negative, got -1"),
        ("x_train", (3, 1), np.nan, "x_train must be finite in float32, got NaN or infinity in 1 of 48 samples"),
    ],
)
def test_unusable_data_is_reported(arrays, tmp_path, key, index, value, text):
    arrays[key] = arrays[key].copy()
    arrays[key][index] = value
    np.savez(tmp_path / "bad.npz", **arrays)
    assert_one_line(invoke("--data", tmp_path / "bad.npz", "--out", tmp_path / "out", *SHORT), text)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_created_is_reported(file, tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = invoke("--data", file, "--out", tmp_path / "taken" / "out", *SHORT)
    assert_one_line(result, "out must be a writable directory")


def test_a_directory_without_write_permission_is_reported(file, tmp_path, monkeypatch):
    open_ = Path.open

    def refuse(path, mode="r", *arguments, **options):
        if "w" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    result = invoke("--data", file, "--out", tmp_path / "out", *SHORT)
    assert_one_line(result, "Permission denied")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_an_earlier_comparison_is_kept_without_overwrite(file, tmp_path):
    words = ["--norms", "none", "--data", file, "--out", tmp_path / "out", *SHORT]
    assert invoke(*words).exit_code == 0
    before = (tmp_path / "out" / "summary.json").read_text()
    assert_one_line(invoke(*words), "must not hold an earlier comparison")
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert invoke(*words, "--overwrite").exit_code == 0


def test_omitted_options_keep_their_values_when_a_comparison_is_resumed(file, tmp_path):
    out = tmp_path / "out"
    assert invoke("--norms", "none", "--data", file, "--lr", 0.3, "--out", out, *SHORT).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    result = invoke("--resume", "--out", out, "--norms", "none", "layer")
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["[1/1] layer, seed 0"]
    after = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert set(after) - set(before) == {"mlp-layer-before-lr0.3-batch8-iid-seed0.jsonl"}
    assert {name: after[name] for name in before} == before
    assert_one_line(
        invoke("--resume", "--out", out, "--epochs", 1), "epochs was None and is 1; steps was 4 and is None"
    )
    assert_one_line(invoke("--resume"), "resume needs out, the directory of the comparison to continue")
    assert_one_line(invoke("--resume", "--out", tmp_path / "uot"), f"but {tmp_path / 'uot'} does not exist. Check the")
    assert not (tmp_path / "uot").exists()


def test_a_report_is_rebuilt(file, tmp_path):
    out = tmp_path / "out"
    first = invoke("--norms", "none", "--data", file, "--out", out, *SHORT)
    (out / "report.html").unlink()
    result = invoke("--report", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == first.stdout
    assert result.stderr == ""
    assert (out / "report.html").is_file()
    held = json.loads(invoke("--report", out, "--json").stdout)
    assert (held["schema"], held["verb"], held["report"]) == (1, "compare", str(out / "report.html"))
    assert held["headline"] == first.stdout.splitlines()[:-2]
    assert held["summary"] == json.loads((out / "summary.json").read_text())
    assert "accuracy reached 1.0 %" in invoke("--report", out, "--target-accuracy", 0.01).stdout
    assert_one_line(invoke("--report", out, "--lr", 0.1, "--seeds", 2), "got --lr, --seeds. Leave these out.")
    assert_one_line(invoke("--report", tmp_path / "none"), "report must name the directory of a comparison")


def test_missing_extras_are_reported(file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    result = invoke("--data", file, "--out", tmp_path / "out", *SHORT)
    assert_one_line(result, "matplotlib cannot be imported. Install with: pip install 'batchnorm[compare]'")


def test_control_c_ends_with_130_and_one_line(file, tmp_path):
    out = tmp_path / "out"
    words = ["--norms", "none", "--data", str(file), "--batch-size", "8", "--steps", "1000000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm", "compare", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not where tests run in the background
    )  # fmt: skip
    partial = out / "runs" / "mlp-none-before-lr0.1-batch8-iid-seed0.jsonl.partial"
    try:
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > 10_000):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        f"batchnorm compare: interrupted; 0 finished runs are in {out / 'runs'}, without a summary. Continue "
        f"with: batchnorm compare --resume --out {out}"
    )
    assert "Traceback" not in stderr
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [partial.name, "settings.json"]
