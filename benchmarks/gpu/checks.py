"""Checks before any figure: the kernels are used, pass the tests of the contract, and stay within their memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import batchnorm
from benchmarks.gpu.layers import fallback
from benchmarks.gpu.timing import Deadline
from benchmarks.measuring import records

ROOT = Path(__file__).parents[2]
KEY = ("device", "part")
PASSED, FAILED, CUT, SKIPPED = "passed", "failed", "cut off", "skipped"
_SHOWN = 60  # lines of the output of a check that fails
# Folders of CUDA, for a sanitizer that is not on the path.
_CUDA = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")


class UnusedError(Exception):
    """The kernels are not used on this device."""


@dataclass(frozen=True)
class Outcome:
    """The result of a check: one of `PASSED`, `FAILED`, `CUT` (no failure before its time was over) and `SKIPPED`."""

    result: str
    detail: str


@dataclass(frozen=True)
class Check:
    """A check: its name, the seconds that it may take, and the function that takes them and returns the outcome."""

    name: str
    seconds: float
    run: Callable[[float], Outcome]


def stays_on_triton(seconds: float, device: torch.device | None = None) -> Outcome:
    """Train, evaluate and train again, in both layouts and in two dtypes: the kernels must still be used after each."""
    device = device or torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for affine in (True, False):
                layer = batchnorm.BatchNorm2d(64, affine=affine, device=device)
                for training in (True, False, True):
                    layer.train(training)
                    x = torch.randn(32, 64, 28, 28, device=device).to(dtype).to(memory_format=layout).requires_grad_()
                    layer(x).sum().backward()
                    if found := fallback():
                        mode = "training" if training else "evaluation"
                        return Outcome(FAILED, f"after {mode} in {dtype}, {layout}: {found}")
    return Outcome(PASSED, batchnorm.backends()["cuda"])


def contract(seconds: float) -> Outcome:
    """Run the tests of the contract on the device; a test in which a kernel falls back fails."""
    if importlib.util.find_spec("pytest") is None:
        return Outcome(SKIPPED, "pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.no_fallback", "-k", "cuda or gpu"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(os.cpu_count() or 1, 8))]
    return _in_process([*command, "tests/ops/test_contract.py", "tests/ops/triton/test_on_a_gpu.py"], seconds)


def sanitizer(seconds: float) -> Outcome:
    """Start every kernel under compute-sanitizer, which finds accesses outside of tensors."""
    found = _sanitizer()
    if found is None:
        return Outcome(SKIPPED, "compute-sanitizer is not installed")
    command = [found, "--tool", "memcheck", "--error-exitcode", "9"]
    # Without torch's allocator, each tensor is an allocation of its own, whose bounds the sanitizer knows.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return _in_process([*command, sys.executable, "-m", "benchmarks.gpu.every_kernel"], seconds, settings)


CHECKS = (
    Check("the kernels stay in use", 30, stays_on_triton),
    Check("tests of the contract", 60, contract),
    Check("compute-sanitizer", 40, sanitizer),
)


def run(checks: tuple[Check, ...], device: str, table: records.Table, deadline: Deadline) -> list[str]:
    """Run checks in order, and write the outcome of each at once; return the failures.

    Raises:
        UnusedError: the first check fails. The others would check another implementation than the kernels.
    """
    failures = []
    for check in checks:
        start = time.monotonic()
        outcome = Outcome(SKIPPED, "no time was left") if deadline.passed() else check.run(check.seconds)
        row = {"device": device, "part": check.name, "result": outcome.result, "detail": outcome.detail}
        table.append([{**row, "seconds": time.monotonic() - start}])
        print(f"{check.name}: {outcome.result}: {outcome.detail}", flush=True)
        if outcome.result == FAILED:
            failures.append(f"{check.name}: {outcome.detail}")
            if check is checks[0]:
                raise UnusedError(failures[0])
    return failures


def _sanitizer() -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in _CUDA if folder)])
    return shutil.which("compute-sanitizer", path=path)


def _in_process(command: list[str], seconds: float, settings: dict[str, str] | None = None) -> Outcome:
    """Run a command in the repository; it fails by its status, and is interrupted when its time is over."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, **(settings or {})}
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=_let_interrupt,
    )  # fmt: skip
    try:
        text, cut = process.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        text, cut = _interrupted(process), True
    lines = text.strip().splitlines() or ["no output"]
    failed = bool(process.returncode) and (not cut or any(" failed" in line for line in lines[-3:]))
    if failed:
        print("\n".join(lines[-_SHOWN:]), flush=True)
    detail = f"after {seconds:.0f} s: {lines[-1]}" if cut else lines[-1]
    return Outcome(FAILED if failed else CUT if cut else PASSED, detail)


def _let_interrupt() -> None:
    """Let SIGINT interrupt this process, although a shell that runs the benchmark in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(process: subprocess.Popen[str]) -> str:
    """Interrupt a process and its children, as Ctrl-C does, and return what they printed; kill them if they go on."""
    for signal_, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
        os.killpg(process.pid, signal_)
        try:
            return process.communicate(timeout=patience)[0]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("communicate without a timeout returns")
