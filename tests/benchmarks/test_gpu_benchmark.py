"""The benchmark of GPUs, as far as it goes without one; nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from batchnorm.ops.triton import plan
from benchmarks import gpu, records
from benchmarks.gpu_timing import HostClock


def test_a_dry_run_measures_every_case_and_prints_one_table(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu.main, ["--dry", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    rows = records.read(tmp_path / "gpu.csv")
    assert len(rows) == 8 * 3 + 2
    assert {r["contender"] for r in rows} == {gpu.OURS, gpu.TORCH, gpu.NATIVE}
    assert all(math.isfinite(float(r["share_of_floor"])) for r in rows if r["floor_ms"])
    assert result.output.count("BN+add+ReLU") == 4
    assert "ResNet-50 training step: torch's time / ours" in result.output


def test_tuning_tries_every_candidate_and_leaves_the_table(tmp_path: Path) -> None:
    before = plan.SETTINGS
    result = CliRunner().invoke(gpu.main, ["--dry", "--tune"], catch_exceptions=False)
    assert len(result.output.splitlines()) == sum(map(len, plan.CANDIDATES.values()))
    assert plan.SETTINGS is before
    for field, candidates in plan.CANDIDATES.items():
        assert getattr(before, field) in candidates


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(click.UsageError, match="no CUDA device here. With --dry"):
        gpu.main([], standalone_mode=False)


def test_the_floor_counts_what_must_be_moved() -> None:
    registers, cache = 256 << 10, 50 << 20
    large = gpu.Case((256, 64, 112, 112), "contiguous", "float32", False)
    assert large.passes(registers, cache) == 8  # x, x, y; x, dy, x, dy, dx
    assert dataclasses.replace(large, residual=True).passes(registers, cache) == 12  # and the residual; y, y and dz
    channel = gpu.Case((32, 2048, 14, 14), "contiguous", "float32", False)
    assert channel.passes(registers, cache) == 5  # x, y; x, dy, dx
    assert dataclasses.replace(channel, residual=True).passes(registers, cache) == 8
    assert dataclasses.replace(channel, layout="channels-last").passes(registers, cache) == 8
    assert dataclasses.replace(channel, layout="channels-last").passes(registers, 4 * channel.nbytes) == 5
    assert gpu.Case((32, 512, 28, 28), "contiguous", "float32", False).passes(registers, cache) == 5
    twice = gpu.Case((64, 512, 28, 28), "contiguous", "float32", False)
    assert twice.passes(registers, cache) == 7  # x alone fits, x and dy do not


def test_a_wrong_result_is_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "wrong_by", lambda case, device: float("nan"))
    result = CliRunner().invoke(gpu.main, ["--dry", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "nothing is reported" in result.output
    assert not (tmp_path / "gpu.csv").exists()


def test_inputs_rotate_until_they_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    clock = HostClock()
    monkeypatch.setattr(clock, "seconds", lambda calls, **_: lengths.append(len(calls)) or 1.0)
    monkeypatch.setattr(clock, "cache_bytes", lambda: 10_000)
    case = gpu.Case((4, 8, 6, 6), "contiguous", "float32", False)
    gpu.measure(case, clock, [gpu.OURS], 1e9, 1)
    assert set(lengths) == {2 * 10_000 // (2 * case.nbytes) + 1}
