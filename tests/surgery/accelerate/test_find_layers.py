"""The layers and modules that are accelerated, and those that are left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.accelerate.accelerate import accelerate
from tests.surgery import networks


def test_layers_that_are_not_torchs_own_are_left() -> None:
    class Own(nn.BatchNorm2d):
        pass

    patched = nn.BatchNorm2d(3)
    patched.forward = patched.forward
    model = nn.Sequential(Own(3), patched, nn.SyncBatchNorm(3), nn.BatchNorm2d(3, momentum=1.5), nn.InstanceNorm2d(3))
    fast, report = accelerate(model, inplace=True)
    assert [type(m) for m in fast] == [Own, nn.BatchNorm2d, nn.SyncBatchNorm, nn.BatchNorm2d, nn.InstanceNorm2d]
    assert report.changed == ()
    reasons = [change.reason for change in report.left]
    assert "its own class" in reasons[0]
    assert reasons[1] == "has its own forward instead of its class's"
    assert "synchronizes processes" in reasons[2]
    assert "expects momentum in [0, 1] or None, got 1.5" in reasons[3]
    assert len(reasons) == 4


def test_a_module_with_a_forward_of_its_own_keeps_it() -> None:
    block = networks.BasicBlock(4, 4)
    block.forward = lambda x, own=block.forward: own(x) * 2
    fast, report = accelerate(block, inplace=True)
    assert not report.fused
    assert "has its own forward" in report.changed[0].reason
    assert type(fast.bn1) is bn.BatchNorm2d


def test_modules_that_the_example_inputs_do_not_reach_are_not_rewritten() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            return (self.body(x), self.head(x)) if self.training else self.body(x)

    report = accelerate(Auxiliary(), torch.randn(5, 4)).report
    assert set(report.fused) == {"body.0"}
    assert report.changed[1].reason == "head (Sequential) is not called with the example inputs"


def test_lazy_layers_become_ours() -> None:
    model, fast = (nn.Sequential(nn.LazyBatchNorm1d(dtype=torch.float64), nn.ReLU()) for _ in range(2))
    _, report = accelerate(fast, inplace=True)  # torch does not copy what is not there yet
    assert type(fast[0]) is bn.LazyBatchNorm1d
    assert "accelerate the model again" in report.changed[0].reason
    x = torch.randn(5, 4).double()
    assert_close(fast(x), model(x))
    assert type(fast[0]) is bn.BatchNorm1d
    fast, report = accelerate(fast)
    assert len(report.fused) == 1
    assert_close(fast(x), model(x))


def test_a_layer_alone_and_a_model_without_any() -> None:
    fast, report = accelerate(nn.BatchNorm2d(3))
    assert type(fast) is bn.BatchNorm2d
    assert len(report.changed) == 1
    assert str(accelerate(nn.Linear(2, 2)).report).startswith("accelerate: 0 changed, 0 left")
