"""Interruptions of forward passes that wait between layers."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import undo
from batchnorm.recalibration import paused

LINES_OF = {str(Path(paused.__file__)), threading.__file__}


class Interruption(BaseException):
    """As a Ctrl-C."""


@pytest.fixture
def no_deadlock() -> Iterator[None]:
    """Fail after 30 seconds."""

    def fail(*_: Any) -> None:
        raise TimeoutError("a lock is held")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(model: nn.Module, interrupted_line: int = 0) -> int:
    """Recalibrate, and raise at one line that the main thread reaches in `paused.py`; return how many it reaches."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in LINES_OF:
            return None
        caller: FrameType | None = frame
        while caller is not None and caller.f_code.co_filename != paused.__file__:
            caller = caller.f_back
        if event == "line" and caller is not None and not undo._must_wait(frame):
            lines += 1
            if lines == interrupted_line:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        bn.recalibrate(model, [torch.rand(4, 3), torch.rand(5, 3)], passes="sequential")
    finally:
        sys.settrace(before)
    return lines


def test_an_interruption_at_any_line_leaves_no_pass_and_no_lock(no_deadlock: None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Linear(4, 4), bn.BatchNorm1d(4)).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count = run(model)
    assert count > 30
    for line in range(1, count + 1):
        with pytest.raises(Interruption):
            run(model, line)
        for thread in threading.enumerate():
            if thread.name == "recalibrate":
                thread.join(5)
                assert not thread.is_alive(), line
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
