"""One JSON object on standard output, and nothing else there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from batchnorm.cli.app import app
from batchnorm.cli.outputs.reporting import ReportingCommand

MODULE = """
import torch
from torch import nn

def build():
    print("building")
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))

def loader():
    print("loading")
    return [torch.randn(8, 4, 7, 7)]
"""
NET = "net_for_reporting:build"
COMMANDS = {
    "doctor": f"{NET} --data net_for_reporting:loader",
    "inspect": f"{NET} --input 1,4,7,7",
    "fold": f"{NET} --input 1,4,7,7 -o folded.pth",
    "accelerate": f"{NET} --input 2,4,7,7",
    "recalibrate": f"{NET} --data net_for_reporting:loader -o new.pth",
    "standardize": "x.npy -o y.npy",
}
CHANGE = {"path", "was", "now", "reason"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "net_for_reporting.py").write_text(MODULE)
    np.save(tmp_path / "x.npy", np.array([[1.0, 2.0], [3.0, np.nan]]))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("net_for_reporting", None)


def invoke(command: str) -> Result:
    words = [command, *COMMANDS[command].split(), "--json", *["--nan-policy", "propagate"] * (command == "standardize")]
    return CliRunner().invoke(app, words, prog_name="batchnorm")


def strictly(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    held: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return held


def test_every_command_that_reports_has_json() -> None:
    reporting = {name for name, command in app.commands.items() if isinstance(command, ReportingCommand)}
    assert reporting == {*COMMANDS, "compare"}  # test_compare.py has its test


@pytest.mark.parametrize("command", COMMANDS)
def test_standard_output_is_one_json_object(command: str) -> None:
    result = invoke(command)
    assert result.exit_code == 0, result.stderr
    held = strictly(result.stdout)
    assert held["schema"] == 1
    assert ("building" in result.stderr) == (command != "standardize")
    if command in ("fold", "accelerate", "recalibrate"):
        (change,) = held["changed"]
        assert held["verb"] == command and held["left"] == [] and set(change) == CHANGE
        assert change["path"] == "1"


def test_the_fields_of_each_verb() -> None:
    folded = strictly(invoke("fold").stdout)
    assert (folded["output"], folded["before"], folded["remaining"]) == ("folded.pth", 1, 0)
    assert folded["error"] < 1e-5
    assert strictly(invoke("accelerate").stdout)["fused"] == {
        "1": {"holder": "", "residual": False, "activation": "relu"}
    }
    measured = strictly(invoke("recalibrate").stdout)
    assert (measured["samples"], measured["output"]) == (8, "new.pth")
    (layer,) = measured["layers"]
    assert layer["paths"] == ["1"] and 0 < layer["shift_median"] <= layer["shift_max"]
    standardized = strictly(invoke("standardize").stdout)
    assert standardized["mean"] == [2.0, None] and standardized["deviation"] == [1.0, None]


def test_an_error_leaves_standard_output_empty() -> None:
    result = CliRunner().invoke(app, ["inspect", "net_for_reporting:missing", "--json"], prog_name="batchnorm")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
