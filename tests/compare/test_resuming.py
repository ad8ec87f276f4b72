"""Continuing a comparison: what is finished is not trained again, and what differs is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from batchnorm import compare
from batchnorm.cli.app import app
from batchnorm.compare import ComparisonError, resuming
from batchnorm.compare.training import loop
from batchnorm.compare.training.cells import Cells
from tests.compare.conftest import small_arrays

pytestmark = pytest.mark.usefixtures("no_pictures")


def small(data, out: Path, **options) -> compare.Result:
    options = {"batch_size": 16, "steps": 4, "seeds": 2, "progress": False, **options}
    return compare.run(data=data, out=out, **options)


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, float, int]]:
    """The cells that are trained."""
    cells, train = [], Cells.train

    def spy(self, choice, seed, *rest):
        found = train(self, choice, seed, *rest)
        cells.append((choice.norm, choice.lr, seed))
        return found

    monkeypatch.setattr(Cells, "train", spy)
    return cells


def curves(result: compare.Result) -> list[list[float | None]]:
    return [[step.loss for step in run.steps] for run in result.runs]


def test_an_interrupted_comparison_is_continued_where_it_broke_off(data, tmp_path, monkeypatch, trained):
    whole = small(data, tmp_path / "whole")
    trained.clear()
    step, calls = loop._step, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3 + 3 + 4 + 2:  # the warm-up of each norm, one run, and half of the next
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(data, tmp_path / "out")
    monkeypatch.setattr(loop, "_step", step)
    assert trained == [("none", 0.1, 0)]
    first = (tmp_path / "out" / "runs" / whole.runs[0].file_name).read_bytes()
    found = small(data, tmp_path / "out", resume=True)
    assert trained == [("none", 0.1, 0), ("batch", 0.1, 0), ("batch", 0.1, 1), ("none", 0.1, 1)]
    assert curves(found) == curves(whole)
    assert (tmp_path / "out" / "runs" / whole.runs[0].file_name).read_bytes() == first
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert found.summary["started"] == json.loads((tmp_path / "out" / "settings.json").read_text())["started"]


def test_a_finished_comparison_is_widened(data, tmp_path, trained):
    small(data, tmp_path, norms="none")
    trained.clear()
    found = small(data, tmp_path, norms=["none", "batch"], lr=[0.1, 0.5], seeds=3, resume=True)
    assert len(trained) == 12 - 2
    assert len(found.runs) == 12
    assert curves(found) == curves(small(data, tmp_path / "new", norms=["none", "batch"], lr=[0.1, 0.5], seeds=3))
    trained.clear()
    again = small(data, tmp_path, norms=["none", "batch"], lr=[0.1, 0.5], seeds=3, resume=True)
    assert trained == []
    assert again.headline == found.headline


def test_resuming_what_is_not_there_is_refused(data, tmp_path, trained):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text("mine")
    for name, missing in (("new", "does not exist"), ("other", "has no settings.json")):
        with pytest.raises(ComparisonError, match=f"directory of an earlier comparison, but .*{name} {missing}"):
            small(data, tmp_path / name, resume=True)
    assert trained == [] and [path.name for path in tmp_path.rglob("*")] == ["other", "summary.json"]
    assert (tmp_path / "other" / "summary.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "steps was 4 and is 5"),
        ({"steps": None, "epochs": 1}, "epochs was None and is 1; steps was 4 and is None"),
        ({"optimizer": "adam", "lr": 0.1}, "optimizer was 'sgd' and is 'adam'"),
        ({"schedule": "cosine"}, "schedule was 'constant' and is 'cosine'"),
        ({"model": "sigmoid-mlp"}, "first of model was 'mlp' and is 'sigmoid-mlp'"),
        ({"dropout": 0.5}, "lacks dropout None"),
        ({"input_norm": True}, "input_norm was False and is True"),
        ({"evaluate_every": 2}, "evaluate_every was None and is 2"),
        ({"norms": ["batch", "none"]}, "first of norms was 'none' and is 'batch'"),
        ({"norms": ["none"]}, "lacks norms batch"),
        ({"lr": [0.5, 1.0]}, "lacks lr 0.1"),
        ({"seeds": 1}, "lacks 2 seeds"),
    ],
)
def test_what_differs_is_named_and_nothing_is_lost(data, finished, options, message):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ComparisonError, match=message):
        small(data, finished, resume=True, **options)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("finished")
    small(data, out)
    return out


def test_other_data_under_the_same_name_are_noticed(data, finished):
    images = data.x_train.clone()
    images[0, 0] += 1e-3
    other = compare.Data(data.name, images, data.y_train, data.x_test, data.y_test, 3, data.scaling)
    with pytest.raises(ComparisonError, match="content of data was '[0-9a-f]{32}' and is '[0-9a-f]{32}'"):
        small(other, finished, resume=True)
    assert resuming.fingerprint(other) != resuming.fingerprint(data) == resuming.fingerprint(data)


def test_resuming_needs_a_directory(data):
    with pytest.raises(ComparisonError, match="resume needs out"):
        compare.run(data=data, resume=True)


def test_a_killed_comparison_continues_from_the_command_line(tmp_path, monkeypatch):
    """Killed while the second run is being trained; the options need not be given again."""
    np.savez(tmp_path / "clusters.npz", **small_arrays())
    out = tmp_path / "out"
    words = ["--data", "clusters.npz", "--seeds", "1", "--batch-size", "8", "--lr", "0.05", "--steps", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "batchnorm", "compare", "--out", str(out)]
    process = subprocess.Popen(
        [*command, *words, "--evaluate-every", "10"], cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = out / "runs" / "mlp-batch-before-lr0.05-batch8-iid-seed0.jsonl.partial"
    while process.poll() is None and not second.exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert second.exists()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", "--out", str(out), "--resume"])
    assert done.exit_code == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["[1/1] batch, seed 0"]
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert (settings["steps"], settings["grid"]["lr"], settings["grid"]["batch_size"]) == (300, [0.05], [8])
    assert len(json.loads((out / "summary.json").read_text())["runs"]) == 2
