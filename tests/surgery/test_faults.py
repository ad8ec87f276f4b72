"""Whatever interrupts a verb in the middle, the model, the optimizer and the process are as they were.

Each verb runs with an interruption at the first call, and at the last, of each function of this library that it
comes through.
"""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.undo import _is_undoing as is_undoing
from tests.surgery import networks
from tests.surgery.accelerate.test_failures import Snapshot

SOURCE = str(Path(bn.__file__).parent)
# The layers and operators are what the model calls.
ELSEWHERE = tuple(str(Path(SOURCE, room)) for room in ("nn", "ops", "functional.py", "_checks.py"))

Where = tuple[str, str]
X = torch.linspace(-1.0, 2.0, 2 * 3 * 12 * 12).sin().reshape(2, 3, 12, 12)


class Interruption(BaseException):
    """As a Ctrl-C, which nothing on the way may take for an ordinary failure."""


@cache
def place_of(code: CodeType) -> Where | None:
    """The file and the name of a function of the verbs."""
    if not code.co_filename.startswith(SOURCE) or code.co_filename.startswith(ELSEWHERE):
        return None
    return code.co_filename, code.co_qualname if sys.version_info >= (3, 11) else code.co_name


def traced(work: Callable[[], object], at: tuple[Where, int] | None = None) -> Counter[Where]:
    """How often each function is called; interrupts this call of one."""
    calls: Counter[Where] = Counter()
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, _: Any) -> None:
        where = place_of(frame.f_code)
        if where is None or is_undoing(frame):  # signals wait
            return
        calls[where] += 1
        if at == (where, calls[where]) and "<" not in where[1].rpartition(".")[2]:
            sys.settrace(before)  # the rest is faster without
            raise Interruption(where)

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return calls


def residual() -> nn.Module:
    model = networks.ResNet()
    model.conv1.bias = nn.Parameter(torch.ones(8))
    model.layer1[0].bn1.eval()
    model.layer1[1].bn2.weight.requires_grad_(False)
    model.layer2.register_forward_hook(lambda *_: None)
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))


def small() -> nn.Module:
    """With a layer for each of the ways to fold it."""
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()
    )


def slim() -> nn.Module:
    model = residual()
    with torch.no_grad():
        model.layer1[1].bn1.weight[2:5] = 0.0
    return model


def recalibrate(passes: str) -> Callable[[nn.Module, torch.optim.Optimizer], object]:
    return lambda model, _: bn.recalibrate(model, [X, 2 * X], passes=passes, inplace=True)


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, torch.optim.Optimizer], object]]] = {
    "accelerate": (residual, lambda model, _: bn.accelerate(model, X, inplace=True)),
    "undo": (lambda: bn.accelerate(residual(), X).model, lambda model, _: bn.convert(model, to=nn, inplace=True)),
    "convert": (residual, lambda model, _: bn.convert(model, to="BatchRenorm", inplace=True)),
    "freeze": (residual, lambda model, _: bn.freeze(model, inplace=True)),
    "unfreeze": (lambda: bn.freeze(residual()).model, lambda model, _: bn.unfreeze(model, inplace=True)),
    "recalibrate": (residual, recalibrate("single")),
    "recalibrate sequentially": (residual, recalibrate("sequential")),
    "drop_redundant_bias": (
        residual,
        lambda model, optimizer: bn.drop_redundant_bias(model, optimizer, example_inputs=X, inplace=True),
    ),
    "insert_batchnorm": (plain, lambda model, _: bn.insert_batchnorm(model, nn.Conv2d, [X, 2 * X], inplace=True)),
    "parameter_groups": (residual, lambda model, _: bn.parameter_groups(model, 0.1)),
    "prune_channels": (slim, lambda model, _: bn.prune_channels(model, X, inplace=True)),
    "fold": (small, lambda model, _: bn.fold(model, X, inplace=True)),
}
# One of so many places, if each takes a while; tests/test_undo.py and tests/attack interrupt at other moments.
SAMPLE = {
    "accelerate": 32, "undo": 12, "fold": 24, "recalibrate": 16, "recalibrate sequentially": 24,
    "drop_redundant_bias": 32, "prune_channels": 80, "convert": 4, "freeze": 4, "unfreeze": 2,
}  # fmt: skip


def prepared(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after one training step, and its optimizer."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("verb", VERBS)
def test_an_interruption_anywhere_leaves_everything_as_it_was(verb: str) -> None:
    make, run = VERBS[verb]
    model, optimizer = prepared(make)
    calls = traced(lambda: run(model, optimizer))
    interrupted = 0
    places = [(where, nth) for where, times in calls.items() for nth in {1, times}]
    for at in [*places[:: SAMPLE.get(verb, 1)], *places[-2:]]:  # the last calls follow the change
        model, optimizer = prepared(make)
        before, held = Snapshot(model), optimizer.state_dict()
        parameters = [list(map(id, group["params"])) for group in optimizer.param_groups]
        try:
            traced(lambda: run(model, optimizer), at)  # noqa: B023  (called here)
        except Interruption:
            interrupted += 1
        else:
            continue  # a comprehension, or a call that depends on what was called before
        before.assert_same(model)
        assert [list(map(id, group["params"])) for group in optimizer.param_groups] == parameters, at
        assert optimizer.state_dict().keys() == held.keys()
        assert optimizer.state_dict()["state"].keys() == held["state"].keys(), at
    assert interrupted >= 4


def test_an_interruption_anywhere_leaves_what_was_fitted() -> None:
    rng = np.random.default_rng(0)
    x, more = rng.normal(size=(9, 4)), rng.normal(3.0, size=(5, 4))
    former = bn.Standardizer().fit(x)
    uses: list[Callable[[bn.Standardizer], object]] = [
        lambda s: s.fit([more, x]), lambda s: s.partial_fit([more, x]), lambda s: s.merge(former),
        lambda s: s.transform(more), lambda s: s.to_layer(),
    ]  # fmt: skip
    for use in uses:
        calls = traced(lambda use=use: use(bn.Standardizer().fit(x)))  # type: ignore[misc]
        for at in ((where, nth) for where, times in calls.items() for nth in (1, times)):
            fitted = bn.Standardizer().fit(x)
            before = pickle.dumps(fitted)
            with suppress(Interruption):
                traced(lambda use=use, fitted=fitted: use(fitted), at)  # type: ignore[misc]
                continue
            assert pickle.dumps(fitted) == before, at


def test_an_interruption_anywhere_leaves_an_onnx_model_and_the_files(tmp_path: Path) -> None:
    from batchnorm.surgery.fold.onnx import fold_onnx
    from tests.surgery.fold.onnx.graphs import Graph

    g = Graph()
    x = g.call("Relu", g.norm(g.conv(g.norm(g.input("n", 4, "h", "w"), 4), 4, 4, pads=[1, 1, 1, 1]), 4))
    model, output = g.model(x), tmp_path / "folded.onnx"
    output.write_text("earlier")
    data = np.ones((1, 4, 6, 6), np.float32)
    given = model.SerializeToString(deterministic=True)
    calls = traced(lambda: fold_onnx(model, tmp_path / "first.onnx", inputs=data))
    (tmp_path / "first.onnx").unlink()
    interrupted = 0
    places = [(where, nth) for where, times in calls.items() for nth in {1, times}]
    for at in [*places[::5], *places[-2:]]:
        with suppress(Interruption):
            traced(lambda: fold_onnx(model, output, inputs=data), at)
            output.write_text("earlier")
            continue
        interrupted += 1
        assert model.SerializeToString(deterministic=True) == given, at
        assert [path.name for path in tmp_path.iterdir()] == ["folded.onnx"], at
        assert output.read_text() == "earlier", at
    assert interrupted >= 10
