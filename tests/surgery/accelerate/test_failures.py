"""`accelerate` where something fails: the model, the process and the random state are as before."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.accelerate.accelerate import accelerate
from batchnorm.surgery.accelerate.fused_forward import fused_class
from tests.surgery import networks


class Snapshot:
    """Everything of a model and of the process that a verb might leave changed."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = [type(m) for m in model.modules()]
        self.modules = list(model.modules())
        self.modes = [m.training for m in self.modules]
        self.attributes = [
            {k: id(v) if isinstance(v, Tensor) else v for k, v in vars(m).items() if k[0] != "_"} for m in self.modules
        ]
        self.hooks = [{k: len(v) for k, v in vars(m).items() if "hooks" in k and v is not None} for m in self.modules]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.values = [t.detach().clone() for t in self.tensors]
        self.random = random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
        self.grad, self.autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        for name in ("classes", "modes", "attributes", "hooks", "grad", "autocast"):
            assert getattr(now, name) == getattr(self, name), name
        for name in ("modules", "tensors"):
            assert all(a is b for a, b in zip(getattr(now, name), getattr(self, name), strict=True)), name
        assert all(torch.equal(a, b) for a, b in zip(now.values, self.values, strict=True))
        assert now.random[0] == self.random[0]
        assert torch.equal(now.random[1], self.random[1])
        assert np.array_equal(now.random[2][1], self.random[2][1]) and now.random[2][2] == self.random[2][2]


class Faulty(networks.ResNet):
    """Draws random numbers, moves its statistics, and fails late."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        self.train()
        super().forward(x)
        raise ArithmeticError("out of order")


WITH_COPY = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])


@WITH_COPY
@pytest.mark.parametrize(
    ("make", "inputs", "text"),
    [
        (
            networks.ResNet,
            torch.randn(2, 4, 8, 8),
            r"that ResNet takes, got a tensor \[2, 4, 8, 8\] of torch.float32",
        ),
        (networks.ResNet, torch.randn(2, 3), "and the model raised RuntimeError"),
        (
            networks.ResNet,
            {"image": torch.randn(2, 3, 8, 8)},
            "raised TypeError: .*unexpected keyword",
        ),
        (networks.ResNet, "3", "got str, and the model raised TypeError"),
        (Faulty, torch.randn(2, 3, 8, 8), "raised ArithmeticError: out of order. Pass the model's arguments"),
    ],
    ids=["channels", "rank", "name", "type", "the model fails"],
)
def test_inputs_that_the_model_does_not_take(
    make: Callable[[], nn.Module], inputs: Any, text: str, inplace: bool
) -> None:
    model = make()
    model.layer1.eval()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=text):
        accelerate(model, inputs, inplace=inplace)
    before.assert_same(model)


@WITH_COPY
def test_a_number_is_no_example(inplace: bool) -> None:
    model = networks.ResNet()
    before = Snapshot(model)
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple of arguments .* got int"):
        accelerate(model, 3, inplace=inplace)
    before.assert_same(model)


def test_success_changes_only_the_classes() -> None:
    model, x = networks.DenseNet(drop_rate=0.2), torch.randn(2, 3, 12, 12)
    before = Snapshot(model)
    accelerate(model, x)
    before.assert_same(model)
    accelerate(model, x, inplace=True)
    after = Snapshot(model)
    assert after.classes != before.classes
    before.classes = after.classes
    before.assert_same(model)


@pytest.mark.parametrize("fails_at", range(6))
def test_a_class_that_cannot_be_given_leaves_all_as_they_were(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.ResNet()
    before = Snapshot(model)
    given = 0

    def refuse(self: nn.Module, name: str, value: Any) -> None:
        nonlocal given
        if name == "__class__":
            given += 1
            if given == fails_at + 1:
                raise MemoryError("no room")
        nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(networks.BasicBlock, "__setattr__", refuse, raising=False)
    expectation = pytest.raises(MemoryError) if fails_at < 4 else nullcontext()
    with expectation:
        accelerate(model, inplace=True)
    if fails_at < 4:
        monkeypatch.undo()
        before.assert_same(model)


def test_a_rewrite_that_differs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rewrite: Any) -> Any:
        if rewrite.base is networks.BasicBlock:
            rewrite = type(rewrite)(rewrite.base, rewrite.source.replace("return ", "return 1.01 * "), *_rest(rewrite))
        return fused_class(rewrite)

    def _rest(rewrite: Any) -> tuple[Any, ...]:
        return rewrite.arguments, rewrite.positional, rewrite.assumed

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["batchnorm.surgery.accelerate.accelerate"], "fused_class", wrong)
    model = networks.ResNet().double()
    fast, report = accelerate(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    assert set(report.fused) == {"bn1"}
    assert "layer1.0 rewritten differs by 1.0e-02 in evaluation" in report.changed[1].reason
    assert type(fast.layer1[0]) is networks.BasicBlock
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    assert_close(fast(x), model(x))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    model.made = (i for i in range(3))
    x = torch.randn(4, 3)
    before = Snapshot(model)
    for inputs in (None, x):
        with pytest.raises(ValueError, match="expects a model that can be copied, .* Pass inplace=True to change"):
            accelerate(model, inputs)
    with pytest.raises(ValueError, match="expects a model that can be copied, .* Remove that part"):
        accelerate(model, x, inplace=True)
    before.assert_same(model)
    fast, report = accelerate(model, inplace=True)
    assert type(fast[0]) is bn.BatchNorm1d
    assert "cannot be copied to be traced" in report.changed[0].reason


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"accelerate expects a torch.nn.Module, got int. Pass the network itself."):
        accelerate(3)
    with pytest.raises(ValueError, match="with example_inputs expects a model whose parameters have shapes"):
        accelerate(nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU()), torch.randn(4, 3), inplace=True)


def test_a_batch_of_one_is_compared_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    assert len(accelerate(model, torch.randn(1, 3)).report.fused) == 1


def test_nothing_is_kept_from_the_example_inputs() -> None:
    x = torch.randn(2, 3, 12, 12)
    kept = x.clone()
    fast, _ = accelerate(networks.ResNet(), x)
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in fast.parameters())
    assert copy.deepcopy(fast).state_dict().keys() == fast.state_dict().keys()
