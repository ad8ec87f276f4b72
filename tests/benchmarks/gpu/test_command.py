"""The benchmark of GPUs, as far as it goes without one; nothing here looks at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from batchnorm.ops.triton.settings import CANDIDATES, Settings
from batchnorm.ops.triton.table import TABLE
from benchmarks.gpu import checks, command, layers, tune
from benchmarks.gpu.layers import Case
from benchmarks.gpu.report import targets
from benchmarks.gpu.timing import Deadline, DeviceClock, HostClock
from benchmarks.measuring import records

CPU = torch.device("cpu")
SMALL = Case((4, 8, 6, 6), "contiguous", "float32", True)


@pytest.fixture(autouse=True)
def _table_as_before() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.update(before)


def dry_run(out: Path) -> Result:
    return CliRunner().invoke(command.main, ["--dry", "--out", str(out)], catch_exceptions=False)


def test_a_dry_run_measures_every_case_and_prints_one_table(tmp_path: Path) -> None:
    result = dry_run(tmp_path)
    assert result.exit_code == 0
    rows = records.read(tmp_path / "gpu.csv")
    assert len(rows) == 8 * 3 + 2 * 2
    assert {r["contender"] for r in rows} == {command.OURS, command.TORCH, command.NATIVE}
    assert all(math.isfinite(float(r["share_of_floor"])) for r in rows if r["floor_ms"])
    assert sum(line.startswith("BN+add+ReLU") for line in result.output.splitlines()) == 4
    assert "torch / ours, ResNet-50 training step" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(click.ClickException, match="must find a CUDA device.* use --dry"):
        command.main([], standalone_mode=False)


def test_the_floor_counts_what_must_be_moved() -> None:
    registers, cache = 256 << 10, 50 << 20
    large = Case((256, 64, 112, 112), "contiguous", "float32", False)
    assert large.traffic(registers, cache) == 8  # x, x, y; x, dy, x, dy, dx
    assert dataclasses.replace(large, residual=True).traffic(registers, cache) == 12  # and the residual; y, y and dz
    channel = Case((32, 2048, 14, 14), "contiguous", "float32", False)
    assert channel.traffic(registers, cache) == channel.least_traffic == 5  # x, y; x, dy, dx
    assert dataclasses.replace(channel, residual=True).traffic(registers, cache) == 8
    assert dataclasses.replace(channel, layout="channels-last").traffic(registers, cache) == 8
    assert dataclasses.replace(channel, layout="channels-last").traffic(registers, 4 * channel.nbytes) == 5
    assert Case((32, 512, 28, 28), "contiguous", "float32", False).traffic(registers, cache) == 5
    twice = Case((64, 512, 28, 28), "contiguous", "float32", False)
    assert twice.traffic(registers, cache) == 7  # x alone fits, x and dy do not


def test_inputs_rotate_until_they_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    clock = HostClock()
    monkeypatch.setattr(clock, "seconds", lambda calls, **_: lengths.append(len(calls)) or 1.0)
    monkeypatch.setattr(clock, "cache_bytes", lambda: 10_000)
    case = dataclasses.replace(SMALL, residual=False)
    layers.measure(case, clock, command.OURS, 1e9, 1)
    assert set(lengths) == {2 * 10_000 // (2 * case.nbytes) + 1}


class _Wrong(nn.BatchNorm2d):
    """Batch normalization whose gradients for γ, β and the residual are twice what they should be, or less exact."""

    def __init__(self, what: str) -> None:
        super().__init__(8, eps=1e-3 if what == "y" else layers.EPS)
        self.what = what

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is not None
        z = super().forward(x)
        doubled = {"weight": self.weight, "bias": self.bias}.get(self.what)
        if doubled is not None:
            z = z + (z - z.detach() if self.what == "weight" else (doubled - doubled.detach()).reshape(-1, 1, 1))
        return torch.relu(z + (2 * residual - residual.detach() if self.what == "residual" else residual))


@pytest.mark.parametrize("what", ["nothing", "y", "weight", "bias", "residual"])
def test_a_wrong_result_is_seen_wherever_it_is(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def ours(channels: int, device: torch.device) -> tuple[nn.Module, Any]:
        layer = _Wrong(what)
        return layer, layer

    monkeypatch.setattr(layers, "_ours", ours)
    if what == "nothing":
        layers.check(SMALL, CPU)
    else:
        with pytest.raises(ArithmeticError, match="of the largest value"):
            layers.check(SMALL, CPU)


def test_what_fails_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = layers._ours
    largest_error = layers.largest_error

    def failing(case: Case, device: torch.device) -> float:
        if case.dtype == "float32":
            return largest_error(case, device)
        if case.residual:
            raise RuntimeError("first line\nptxas gave up")
        return math.nan

    def out_of_memory(channels: int, device: torch.device) -> Any:
        if not torch.backends.cudnn.enabled:
            raise torch.OutOfMemoryError("too large")
        return layers._torch(channels, device)

    monkeypatch.setattr(layers, "largest_error", failing)
    monkeypatch.setitem(layers.CONTENDERS, command.NATIVE, out_of_memory)
    result = dry_run(tmp_path)
    assert result.exit_code == 1
    assert result.output.count("off by nan of the largest value") == 4  # as it comes, and at the end
    assert result.output.count("RuntimeError: ptxas gave up") == 4
    assert "skipped for lack of time or memory: 4" in result.output
    assert {(r["dtype"], r["contender"]) for r in records.read(tmp_path / "gpu.csv") if r["floor_ms"]} == {
        ("float32", command.OURS),
        ("float32", command.TORCH),
    }
    assert layers._ours is ours


def test_eager_in_the_kernels_place_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    found = {"cuda": "triton: compiled at first use"}
    monkeypatch.setattr(layers.batchnorm, "backends", lambda: found)
    with layers.settings_of(command.OURS, cuda):
        pass
    for text in ("eager: Triton is not installed", "triton: compiled at first use, except\neager: a kernel: its cause"):
        found["cuda"] = text
        for contender, device in ((command.TORCH, cuda), (command.OURS, CPU)):
            with layers.settings_of(contender, device):
                pass
        ours = layers.settings_of(command.OURS, cuda)
        with pytest.raises(RuntimeError, match="must be used, but the implementation is"), ours:
            pass


def test_when_the_time_is_over_the_table_is_printed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "TIMED", 0.0)
    monkeypatch.setattr(command.Run, "network", lambda self, batch: None)
    result = dry_run(tmp_path)
    assert result.exit_code == 0
    assert "0 cases checked and timed" in result.output
    assert "skipped for lack of time or memory: 8" in result.output
    assert "torch.compile / ours, mean" in result.output
    assert command.LIMIT < command.LAST < 480


def test_a_call_that_never_comes_back_does_not_keep_what_was_found() -> None:
    program = (
        "import time; from benchmarks.gpu.timing import Watchdog; "
        "Watchdog(0.1, lambda: print('found', flush=True)); time.sleep(60)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert (result.returncode, result.stdout) == (1, "found\n")


def test_where_the_device_is_lost_what_was_found_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lost(channels: int, device: torch.device) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(layers.CONTENDERS, command.TORCH, lost)
    result = dry_run(tmp_path)
    assert result.exit_code == 1
    assert "FAILED 4×8×6×6 contiguous float32 BN+ReLU, torch: the device is lost" in result.output
    assert "the device is lost: CUDA error: an illegal memory access" in result.output
    assert len(records.read(tmp_path / "gpu.csv.partial")) == 1  # ours, before it
    assert not (tmp_path / "gpu.csv").exists()


def test_targets_are_met_or_missed_by_what_was_measured() -> None:
    row = {"shape": "a", "layout": "b", "dtype": "c", "floor_ms": 1.0, "share_of_floor": 0.9, "beyond_cache": True}
    rows = [
        {**row, "task": task, "contender": name, "ms": ms, "read_once": task == "BN+add+ReLU"}
        for task, times in (("BN+ReLU", (2.0, 3.0)), ("BN+add+ReLU", (1.0, 1.9)))
        for name, ms in zip((command.OURS, command.TORCH), times, strict=True)
    ]
    rows += [
        {"contender": n, "ms_launched": ms, "peak_bytes": 5} for n, ms in ((command.OURS, 8.0), (command.TORCH, 10.0))
    ]
    found = {what: measured for what, _, measured in targets(rows)}
    assert list(found.values())[:5] == pytest.approx([0.9, 1.5, 1.5, 1.9, 1.9])
    assert math.isnan(found["torch.compile / ours, mean"])
    assert list(found.values())[6:] == pytest.approx([1.25, 1.0])


# Tuning.


def test_tuning_writes_a_table_that_is_a_module_in_our_style(tmp_path: Path) -> None:
    path = tmp_path / "table.py"
    result = CliRunner().invoke(command.main, ["--dry", "--tune", "--table", str(path)], catch_exceptions=False)
    assert f"written to {path}" in result.output
    found: dict[str, Any] = {}
    exec(path.read_text(), found)
    assert found["TABLE"] == TABLE
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "--line-length=120", str(path)], check=True)


def test_the_kernels_table_is_what_tuning_would_write() -> None:
    written = tune.PATH.read_text()
    origin = written.split("\n\n")[1].removesuffix('\n"""')
    assert tune.text(TABLE, origin) == written


def test_tuning_takes_what_is_fastest_and_leaves_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Settings(tile=4096, warps=4, ahead=2, programs=8, row_bytes=128, once=0)

    def milliseconds(case: Case, clock: object, contender: str, *_: object) -> dict[str, float]:
        settings = TABLE[case.layout == "channels-last", 4 if case.dtype == "float32" else 2]
        if settings.tile == 1024:
            raise RuntimeError("out of resource: shared memory")
        return {"ms": 1.0 + sum(getattr(settings, f) != getattr(wanted, f) for f in CANDIDATES)}

    monkeypatch.setattr(tune, "measure", milliseconds)
    assert tune.tune(HostClock(), Deadline(60))
    for (rows, _), settings in TABLE.items():
        assert settings == (wanted if rows else dataclasses.replace(wanted, row_bytes=Settings().row_bytes))
    assert not tune.tune(HostClock(), Deadline(0))


# The device's clock, with a device that executes every command at once.


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch) -> DeviceClock:
    captured: list[Any] = []

    class Graph:
        def replay(self) -> None:
            captured.append("replayed")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, other: Event) -> float:
            return 8.0

    fake = {
        "Event": Event, "CUDAGraph": Graph, "graph": lambda graph: contextlib.nullcontext(),
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350, "get_device_name": lambda device: "a device",
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 12, regs_per_multiprocessor=64),
        "is_available": lambda: True, "current_device": lambda: 0,
    }  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock = DeviceClock(CPU)
    clock.captured = captured  # type: ignore[attr-defined]
    return clock


def test_a_device_is_timed_by_events_around_all_calls(device_clock: DeviceClock) -> None:
    called: list[int] = []
    calls = [lambda: called.append(0), lambda: called.append(1)]
    assert device_clock.seconds(calls, repeats=3, captured=False) == 4e-3
    assert len(called) == 2 * (2 + 2 + 3)  # before, twice as in the measurement, measured
    called.clear()
    assert device_clock.seconds(calls, repeats=3, captured=True) == 4e-3
    assert len(called) == 2 * (2 + 1 + 1)  # before, on the other stream, captured
    assert device_clock.captured == ["replayed"] * 5  # type: ignore[attr-defined]
    assert device_clock.peak_bytes(lambda: None) == 250


def test_a_whole_run_goes_through_the_device_s_clock(
    device_clock: DeviceClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "DeviceClock", lambda device: device_clock)
    monkeypatch.setattr(layers, "BATCHES", (2, 4))
    monkeypatch.setattr(command, "BATCHES", (2, 4))
    monkeypatch.setattr(layers, "LAYERS", ((8, 6),))
    monkeypatch.setattr(command, "bandwidth", lambda clock, nbytes, repeats: 1e12 if nbytes == 1 << 30 else 0.0)
    monkeypatch.setattr(layers, "_compiled", layers._torch)
    monkeypatch.setitem(layers.CONTENDERS, command.COMPILED, layers._torch)
    checked: list[str] = []

    def check(name: str) -> checks.Check:
        return checks.Check(name, 1.0, lambda seconds: (checked.append(name), checks.Outcome(checks.PASSED, ""))[1])

    monkeypatch.setattr(checks, "CHECKS", (check("first"), check("second")))
    monkeypatch.setattr(command.Run, "network", lambda self, batch: checked.append(f"network {batch}"))
    result = CliRunner().invoke(command.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert checked == ["first", "second", "network 32", "network 128"]
    assert [r["result"] for r in records.read(tmp_path / "gpu-checks.csv")] == ["passed", "passed"]
    rows = records.read(tmp_path / "gpu.csv")
    assert len(rows) == 2 * 8 * 4
    first = [(r["shape"], r["task"], r["contender"]) for r in rows[:8]]
    assert set(first) == {("2×8×6×6", "BN+ReLU", command.OURS), ("2×8×6×6", "BN+ReLU", command.TORCH)}
    assert {r["shape"] for r in rows} == {"2×8×6×6", "4×8×6×6"}
    assert {r["device"] for r in rows} == {"a device"}
    assert [float(r["ms"]) for r in rows] == pytest.approx([8.0 / int(r["sets"]) for r in rows], rel=1e-4)
