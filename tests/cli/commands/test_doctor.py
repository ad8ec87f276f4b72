"""The verbs `doctor` and `inspect`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm import cli
from batchnorm.rule_texts import rule_texts

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)

def broken():
    model = build()
    model[1].running_var[2] = float("nan")
    return model

def loader():
    return [(torch.randn(16, 3, 8, 8), torch.randint(5, (16,))) for _ in range(4)]

def fails():
    raise OSError("no disk")

def three():
    return [3]

trained = build()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory; its own for every test, as modules are kept."""
    name = f"net_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(NETWORK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_a_healthy_model_exits_with_0(place, capsys) -> None:
    code, out, err = run(["doctor", f"{place}:build"], capsys)
    assert code == 0
    assert "BN110" in out and "not checked" in out
    assert err == ""


@pytest.mark.parametrize(("level", "expected"), [("note", 1), ("warning", 0), ("error", 0)])
def test_the_level_decides_the_exit(place, capsys, level, expected) -> None:
    assert run(["doctor", f"{place}:build", "--fail-on", level], capsys)[0] == expected


def test_an_error_exits_with_1_and_is_shown_first(place, capsys) -> None:
    code, out, _ = run(["doctor", f"{place}:broken"], capsys)
    assert code == 1
    assert out.index("error BN202") < out.index("note BN110")


def test_json_is_all_that_is_printed(place, capsys) -> None:
    code, out, _ = run(
        ["doctor", f"{place}:trained", "--data", f"{place}:loader", "--loss", "cross-entropy", "--json"], capsys
    )
    held = json.loads(out)
    assert code in (0, 1)
    assert (held["schema"], held["samples"]) == (1, 64)


def test_weights_and_a_file_of_data(place, capsys, tmp_path) -> None:
    _, before, _ = run(["doctor", f"{place}:trained", "--json"], capsys)
    state = {
        "0.weight": torch.randn(8, 3, 3, 3), "0.bias": torch.zeros(8), "1.weight": torch.ones(8),
        "1.bias": torch.zeros(8), "1.running_mean": torch.full((8,), 7.0), "1.running_var": torch.ones(8),
        "1.num_batches_tracked": torch.tensor(5), "5.weight": torch.randn(5, 8), "5.bias": torch.zeros(5),
    }  # fmt: skip
    torch.save(state, "w.pth")
    np.savez("d.npz", x=np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype("float32"), y=np.arange(40) % 5)
    words = ["doctor", f"{place}:build", "--weights", "w.pth", "--data", "d.npz", "--batch-size", "16",
             "--loss", "cross-entropy", "-o", "bn.json", "--json"]  # fmt: skip
    _, out, err = run(words, capsys)
    held = json.loads(out)
    used = f"Using the momentum 0.1 of {place}:build, because w.pth does not store one."
    assert err == f"{used} If training used another value, set it there.\n"
    assert held["layers"][0]["running_mean"] == [7.0, 7.0]
    assert held["layers"] != json.loads(before)["layers"]
    assert (held["samples"], held["batches"]) == (40, 3)
    assert json.loads((tmp_path / "bn.json").read_text(encoding="utf-8")) == held


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{net}"], "batchnorm doctor: the model must be module.path:callable, got"),
        (["{net}:missing"], "batchnorm doctor: the model {net}:missing could not be imported: AttributeError"),
        (["{net}:fails"], "batchnorm doctor: {net}:fails must return the network when called without arguments"),
        (["{net}:loader"], "batchnorm doctor: {net}:loader must return a torch.nn.Module, got list"),
        (["{net}:build", "--weights", "none.pth"], "batchnorm doctor: none.pth must hold the state_dict"),
        (["{net}:build", "--data", "none.npz"], "batchnorm doctor: none.npz must be a file of numpy.savez"),
        (["{net}:build", "--data", "no-samples.npz"], "batchnorm doctor: no-samples.npz must hold at least one sample"),
        (["{net}:build", "--data", "scalar.npz"], "batchnorm doctor: scalar.npz must hold x and, if it has targets"),
        (["{net}:build", "--data", "{net}:fails"], "batchnorm doctor: {net}:fails must return batches"),
        (["{net}:build", "--data", "{net}:three"], "batchnorm doctor: diagnose expects batches that are tensors"),
        (["{net}:build", "--loss", "hinge"], "batchnorm doctor: --loss must be module.path:callable, got 'hinge'"),
        (["{net}:build", "-o", "bn.html"], "batchnorm doctor: --output must end in .json or .txt"),
        (["{net}:build", "--batch-size", "9" * 30], "batchnorm doctor: Invalid value for '--batch-size': 9999"),
        (["{net}:build", "--budget", "9" * 30], "batchnorm doctor: Invalid value for '--budget': 9999"),
        (["{net}:build", "--fail-on", "never"], "batchnorm doctor: Invalid value for '--fail-on'"),
        ([], "batchnorm doctor: Missing argument"),
    ],
)
def test_a_usage_error_is_one_line_and_exits_with_2(place, capsys, words, line) -> None:
    np.savez("no-samples.npz", x=np.zeros((0, 3, 8, 8), "float32"))
    np.savez("scalar.npz", x=np.float32(1))
    code, out, err = run(["doctor", *(word.format(net=place) for word in words)], capsys)
    assert code == 2
    assert out == ""
    assert err.startswith(line.format(net=place))
    assert err.count("\n") == 1


def test_without_rich_json_is_left(place, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = run(["doctor", f"{place}:build"], capsys)
    assert code == 2
    assert "pip install 'batchnorm[doctor]'" in err and err.count("\n") == 1
    assert run(["doctor", f"{place}:build", "--json"], capsys)[0] == 0


def test_inspect_prints_every_layer(place, capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, _ = run(["inspect", f"{place}:build", "--input", "1,3,8,8", "--json"], capsys)
    held = json.loads(out)
    (layer,) = held["layers"]
    assert code == 0
    assert (held["schema"], held["verb"], held["model"]) == (1, "inspect", "Sequential")
    assert (layer["path"], layer["after"], layer["before"], layer["foldable"]) == ("1", "0 (conv2d)", "relu", True)
    code, out, _ = run(["inspect", f"{place}:build", "--input", "1,3,8,8"], capsys)
    assert code == 0
    (row,) = [line.split() for line in out.splitlines() if "BatchNorm2d" in line]
    assert row[:5] == ["1", "BatchNorm2d(8)", "0", "(conv2d)", "relu"]
    assert not [line for line in out.splitlines() if line != line.rstrip()]
    monkeypatch.setenv("COLUMNS", "70")
    _, out, _ = run(["inspect", f"{place}:build", "--input", "1,3,8,8"], capsys)
    assert max(map(len, out.splitlines())) <= 70


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{net}:build", "--input", "1,x"], "batchnorm inspect: --input must be positive numbers"),
        (
            ["{net}:build", "--input", "1,3,99999999999999,8"],
            "batchnorm inspect: --input must be the shape of a tensor",
        ),
        (["{net}:build", "--input", "1,3"], "batchnorm inspect: --input must be the shape of an input that the"),
        (["{net}:fails"], "batchnorm inspect: {net}:fails must return the network"),
    ],
)
def test_inspect_reports_usage_errors_in_one_line(place, capsys, words, line) -> None:
    code, _, err = run(["inspect", *(word.format(net=place) for word in words)], capsys)
    assert code == 2
    assert err.startswith(line.format(net=place)) and err.count("\n") == 1


def test_explain_prints_the_documentation_of_codes(capsys) -> None:
    code, out, _ = run(["explain", "bn107", "BN217"], capsys)
    assert code == 0
    assert out.startswith("# BN107: frozen layers still update their running statistics\n")
    assert "# BN217: too few updates for the momentum" in out and "## Fix" in out


def test_explain_lists_the_codes_and_suggests_near_ones(capsys) -> None:
    code, out, _ = run(["explain"], capsys)
    assert code == 0 and [line[:5] for line in out.splitlines()] == sorted(rule_texts())
    code, _, err = run(["explain", "BN17"], capsys)
    assert code == 2 and "BN107" in err and "got BN17" in err
    assert "Run batchnorm explain to list the codes." in run(["explain", "x"], capsys)[2]


def test_explain_imports_no_framework() -> None:
    program = "import sys; from batchnorm.cli.app import app; app(['explain', 'BN107'], standalone_mode=False); "
    program += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
