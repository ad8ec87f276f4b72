"""The checks before any figure of a GPU, on a machine without one."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import checks, command, layers, no_fallback
from benchmarks.gpu.checks import CUT, FAILED, PASSED, SKIPPED, Check, Outcome
from benchmarks.gpu.timing import Deadline, HostClock
from benchmarks.measuring import records

CPU = torch.device("cpu")


def _check(name: str, result: str) -> Check:
    return Check(name, 1.0, lambda seconds: Outcome(result, f"{name} in {seconds} s"))


def _run(tmp_path: Path, *wanted: Check, seconds: float = 60.0) -> list[str]:
    return checks.run(wanted, "a device", records.Table(tmp_path / "checks.csv", checks.KEY), Deadline(seconds))


def _written(tmp_path: Path) -> list[tuple[str, str]]:
    return [(row["part"], row["result"]) for row in records.read(tmp_path / "checks.csv.partial")]


def test_checks_run_in_order_and_each_outcome_is_written_at_once(tmp_path: Path) -> None:
    def second(seconds: float) -> Outcome:
        assert _written(tmp_path) == [("first", PASSED)]
        return Outcome(FAILED, "off")

    assert _run(tmp_path, _check("first", PASSED), Check("second", 1.0, second), _check("third", CUT)) == [
        "second: off"
    ]
    assert _written(tmp_path) == [("first", PASSED), ("second", FAILED), ("third", CUT)]


def test_without_the_kernels_nothing_else_is_checked(tmp_path: Path) -> None:
    with pytest.raises(checks.UnusedError, match="first: first in 1.0 s"):
        _run(tmp_path, _check("first", FAILED), _check("second", PASSED))
    assert _written(tmp_path) == [("first", FAILED)]


def test_a_check_for_which_no_time_is_left_is_skipped(tmp_path: Path) -> None:
    assert _run(tmp_path, _check("first", PASSED), seconds=0.0) == []
    assert _written(tmp_path) == [("first", SKIPPED)]


def test_without_the_kernels_there_are_no_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_clock", lambda dry: HostClock())
    monkeypatch.setattr(checks, "CHECKS", (_check("first", FAILED),))
    monkeypatch.setattr(command.Run, "everything", lambda self: pytest.fail("measured"))
    result = CliRunner().invoke(command.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "FAILED first: first in 1.0 s" in result.output


def test_the_kernels_must_stay_in_use_after_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"cuda": "triton: compiled at first use"}
    monkeypatch.setattr(layers.batchnorm, "backends", lambda: backends)
    assert checks.stays_on_triton(1.0, CPU) == Outcome(PASSED, backends["cuda"])

    forward = layers.batchnorm.BatchNorm2d.forward

    def falls_back_in_evaluation(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            backends["cuda"] = "eager: a kernel does not start"
        return forward(self, x)

    monkeypatch.setattr(layers.batchnorm.BatchNorm2d, "forward", falls_back_in_evaluation)
    outcome = checks.stays_on_triton(1.0, CPU)
    assert outcome.result == FAILED
    assert "after evaluation in torch.float32" in outcome.detail
    assert "a kernel does not start" in outcome.detail


def test_a_test_in_which_a_kernel_falls_back_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = [None, None, None, "eager: the cause"]
    monkeypatch.setattr(no_fallback, "fallback", lambda: found.pop(0))
    for outcome in ("passes", "falls back"):
        hook = no_fallback.pytest_runtest_call(None)  # type: ignore[arg-type]
        next(hook)
        if outcome == "passes":
            with pytest.raises(StopIteration):
                hook.send(None)
        else:
            with pytest.raises(pytest.fail.Exception, match="fell back in this test: eager: the cause"):
                hook.send(None)


def test_a_process_passes_fails_or_is_cut_off() -> None:
    python = [sys.executable, "-c"]
    assert checks._in_process([*python, "print('12 passed')"], 60) == Outcome(PASSED, "12 passed")
    assert checks._in_process([*python, "print('1 failed'); exit(1)"], 60) == Outcome(FAILED, "1 failed")
    assert checks._in_process([*python, "exit(3)"], 60) == Outcome(FAILED, "no output")
    settings = {"A_SETTING": "7"}
    assert checks._in_process([*python, "import os; print(os.environ['A_SETTING'])"], 60, settings).detail == "7"
    # Enough seconds for Python to start on a busy machine.
    endless = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('{} passed in 1 s'); exit(2)"
    assert checks._in_process([*python, endless.format("7")], 3).result == CUT
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        assert checks._in_process([*python, endless.format("2 failed, 7")], 3).result == FAILED
    finally:
        signal.signal(signal.SIGINT, before)


def test_tools_that_are_not_installed_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name, path: None)
    assert checks.sanitizer(1.0).result == SKIPPED
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.contract(1.0) == Outcome(SKIPPED, "pytest is not installed")


def test_the_contract_and_the_sanitizer_start_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(checks, "_in_process", lambda command, *_: commands.append(command))
    monkeypatch.setattr(checks.shutil, "which", lambda name, path: f"/cuda/bin/{name}")
    checks.contract(1.0)
    checks.sanitizer(1.0)
    tests = [part for part in commands[0] if part.startswith("tests/")]
    assert all((checks.ROOT / path).exists() for path in tests)
    assert commands[1][0] == "/cuda/bin/compute-sanitizer"
    assert commands[1][-1] == "benchmarks.gpu.every_kernel"


def test_all_checks_leave_time_for_figures() -> None:
    assert sum(check.seconds for check in checks.CHECKS) < 140
