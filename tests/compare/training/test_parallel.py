"""`batchnorm compare` under torchrun: several processes train one network, and one of them prints."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import compare
from batchnorm.compare.training.parallel import Processes
from tests.compare.conftest import small_arrays
from tests.compare.training import parallel_worker

TRAINING = ["--steps", "6", "--seeds", "1", "--batch-size", "15", "--evaluate-every", "3", "--optimizer", "momentum"]
COMMON = ["--data", "clusters.npz", *TRAINING]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran the command line four times, and what each wrote."""
    folder = tmp_path_factory.mktemp("parallel")
    np.savez(folder / "clusters.npz", **small_arrays())
    (folder / "kept").mkdir()
    (folder / "kept" / "summary.json").write_text("kept")
    calls = [
        ["--norms", "none", "sync", "--out", "out", *COMMON],
        ["--norms", "none", "--out", "kept", *COMMON],
        ["--norms", "none", "--out", "new", "--data", "said.npz", *TRAINING],
        ["--norms", "none", "--out", "new", "--model", "tests.compare.training.parallel_worker:build", *COMMON],
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [*torchrun, str(parallel_worker.__file__), json.dumps(calls)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the output of the first and of the second process in each call."""
    first, second = (json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1))
    return list(zip(first, second, strict=True))


def test_the_first_process_prints_and_writes(folder: Path, said: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    first, second = said[0]
    assert first["code"] in (0, None)
    assert first["out"].splitlines()[-1] == "Report: out/report.html"
    assert [line[:5] for line in first["err"].splitlines() if line.startswith("[")] == ["[1/2]", "[2/2]"]
    assert second == {"code": first["code"], "out": "", "err": ""}
    names = {path.name for path in (folder / "out").rglob("*")} - {"runs"}
    runs = {f"mlp-{norm}-before-lr0.01-batch15-iid-seed0.jsonl" for norm in ("none", "sync")}
    figures = {"accuracy.png", "loss.png", "activations.png", "layers.png"}
    assert names == {"settings.json", "summary.json", "report.html"} | figures | runs
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert [environment["processes"] for environment in summary["environments"]] == [2]
    assert "2 processes with 1 thread each" in (folder / "out" / "report.html").read_text()


def test_two_processes_train_as_one_does(folder: Path, said: object, tmp_path: Path) -> None:
    """On each its share of 15 samples; synchronized batch normalization is batch normalization of all."""
    alone = compare.run(
        ["none", "batch"], data=folder / "clusters.npz", steps=6, seeds=1, batch_size=15, evaluate_every=3,
        optimizer="momentum", out=tmp_path / "alone", progress=False,
    )  # fmt: skip
    for name, expected in zip(("none", "sync"), alone.runs, strict=True):
        run = compare.Run.read(folder / "out" / "runs" / f"mlp-{name}-before-lr0.01-batch15-iid-seed0.jsonl")
        assert [step.loss for step in run.steps] == pytest.approx([step.loss for step in expected.steps], rel=1e-4)
        assert [e.step for e in run.evaluations] == [0, 3, 6]
        losses = [[evaluation.test_loss for evaluation in each.evaluations] for each in (run, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert (run.parameters, run.shared, run.own) == (expected.parameters, expected.shared, expected.own)


def test_an_error_of_all_processes_is_printed_once(
    folder: Path, said: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    first, second = said[1]
    assert first["err"] == (
        "batchnorm compare: rank 0: out must not hold an earlier comparison, but kept has summary.json. Choose another "
        "directory, continue that comparison with resume (--resume), or replace it with overwrite (--overwrite).\n"
    )
    assert second["err"] == ""
    assert [each["code"] for each in said[1]] == [2, 2]
    assert (folder / "kept" / "summary.json").read_text() == "kept"


def test_a_file_that_no_process_has_is_reported_once(said: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    first, second = said[2]
    assert first["err"] == "batchnorm compare: data must be a file that exists, got 'said.npz'. Check the path.\n"
    assert (first["code"], second) == (2, {"code": 2, "out": "", "err": ""})


def test_the_process_that_fails_says_why(folder: Path, said: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    first, second = said[3]
    assert second["err"].startswith(
        "batchnorm compare: rank 1: the model with norm 'none', seed 0, must run without errors when it "
        "took training step 2, but raised RuntimeError: shapes do not fit (parallel_worker.py, line "
    )
    assert first == {"code": 2, "out": "", "err": ""}
    assert second["code"] == 2
    assert not (folder / "new").exists()


def test_each_process_has_its_share_of_every_batch() -> None:
    index = torch.arange(7)
    shares = [Processes(rank, 3).share(index).tolist() for rank in range(3)]
    assert shares == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(compare.ComparisonError, match="batch_size must be at least the number of processes, 3, got 2"):
        Processes(0, 3).check(2)


@pytest.mark.parametrize(
    ("failed", "rank"),
    [
        ([None, compare.ComparisonError("b"), compare.ComparisonError("c")], 1),
        ([compare.ComparisonError("a")] * 3, None),
    ],
)
def test_what_fails_on_one_process_fails_on_all(
    monkeypatch: pytest.MonkeyPatch, failed: list[Exception | None], rank: int | None
) -> None:
    def gather(errors: list[Exception | None], mine: Exception | None) -> None:
        assert mine is failed[2]
        errors[:] = failed

    def call() -> None:
        assert failed[2] is not None
        raise failed[2]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(compare.ComparisonError) as raised:
        Processes(2, 3).together(call)
    assert raised.value is failed[rank or 0]
    assert raised.value.rank == rank


def test_alone_a_full_disk_is_what_it_is() -> None:
    def call() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        Processes().on_first(call)
