"""The progress bar of functions that are usually fast."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.execution import progress


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def folded_onnx(**options: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from batchnorm.surgery.fold.onnx import fold_onnx

    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        net (float[n, 1, 4, 4] x) => (float[n, 1, 4, 4] z) <float[1, 1, 1, 1] w = {2.0}, float[1] s = {0.5}>
        { y = Conv (x, w) z = BatchNormalization (y, s, s, s, s) }
    """)
    fold_onnx(model, **options)


VERBS = {
    "fold": lambda **options: bn.fold(network(), torch.randn(2, 3, 8, 8), **options),
    "accelerate": lambda **options: bn.accelerate(network(), torch.randn(2, 3, 8, 8), **options),
    "fold_onnx": folded_onnx,
}


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the seconds without a bar, and lets each function take at least 0.2 s."""
    during = progress.Bar.during

    def slow(self: Any, title: str) -> None:
        during(self, title)
        time.sleep(0.2)

    monkeypatch.setattr(progress.Bar, "during", slow)
    monkeypatch.setenv("FORCE_COLOR", "1")

    def set_to(seconds: float) -> None:
        for name in ("fold.onnx.folding", "fold.pytorch.folding", "accelerate.accelerate"):
            monkeypatch.setattr(importlib.import_module(f"batchnorm.surgery.{name}"), "PATIENCE", seconds)

    return set_to


@pytest.mark.parametrize("verb", VERBS)
def test_a_bar_appears_once_a_call_takes_long(
    verb: str, patience: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    patience(0.01)
    VERBS[verb](progress=True)
    shown = capsys.readouterr()
    assert ("tracing" if verb == "accelerate" else "running the original") in shown.err and not shown.out
    patience(60.0)
    VERBS[verb](progress=True)
    patience(0.01)
    VERBS[verb]()  # standard error is no terminal
    assert not capsys.readouterr().err


def test_a_bar_ends_if_the_call_fails(patience: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    patience(0.01)
    with pytest.raises(ValueError, match="example_inputs that the model takes"):
        bn.fold(network(), torch.randn(2, 4, 8, 8), progress=True)
    assert capsys.readouterr().err.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is shown, the bar removed


def test_a_step_of_unknown_length_shows_no_total_of_the_step_before() -> None:
    with progress.bar("fold", True) as shown:
        for begin in (lambda: shown.during("checking"), lambda: next(shown.over([0, 0], "reading", None))):
            list(shown.over([0, 0, 0], "folding", 3))
            begin()
            (task,) = shown._display.tasks
            assert (task.description != "folding", task.total, task.completed) == (True, None, 0)
