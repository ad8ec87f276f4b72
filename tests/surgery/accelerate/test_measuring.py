"""`accelerate(..., measure=True)`: what the times decide, and that measuring leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.surgery.accelerate import measuring
from batchnorm.surgery.accelerate.accelerate import accelerate
from tests.surgery import networks
from tests.surgery.accelerate.test_failures import Snapshot


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "_LEAST", 1)


def with_times(monkeypatch: pytest.MonkeyPatch, before: float, after: float) -> None:
    monkeypatch.setattr(measuring, "step_times", lambda *_: (before, after))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_a_model_that_is_not_faster_is_left(monkeypatch):
    with_times(monkeypatch, 0.020, 0.025)
    model, report = accelerate(block(), torch.rand(2, 3, 6, 6), measure=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in block().modules()]
    assert not report.changed and not report.fused and report.difference is None
    (left,) = report.left
    assert left.reason == "a training step takes 20 ms, and 25 ms with this library's layers"
    assert str(report).startswith(
        "accelerate: 0 changed, 1 left, 0 fused with following operations; training step 0.80"
    )


def test_a_model_that_is_faster_is_changed_as_without_measuring(monkeypatch):
    with_times(monkeypatch, 0.025, 0.020)
    model, report = accelerate(block(), torch.rand(2, 3, 6, 6), measure=True)
    plain, other = accelerate(block(), torch.rand(2, 3, 6, 6))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert (report.changed, report.fused) == (other.changed, other.fused)
    assert report.speedup == 1.25 and other.speedup is None


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training):
    model, x = networks.ResNet().train(training), torch.rand(4, 3, 16, 16)
    model(x).sum().backward()
    before, gradients = Snapshot(model), [p.grad.clone() for p in model.parameters()]
    result, report = accelerate(model, x, measure=True)
    assert report.speedup > 0
    before.assert_same(model)
    assert all(
        torch.equal(a, b) for a, b in zip(result.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_measuring_needs_example_inputs():
    with pytest.raises(ValueError, match="measure=True expects example inputs, got None. Pass a batch of training"):
        accelerate(block(), measure=True)


def test_a_batch_that_cannot_train_is_an_error_and_changes_nothing():
    model, x = block(), torch.rand(1, 3, 3, 3)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="on which the model can take a training step, and it raised .*1 value per"):
        accelerate(model, x, inplace=True, measure=True)
    before.assert_same(model)


class BackwardInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = block()

    def forward(self, x):
        y = self.block(x)
        if y.requires_grad:
            y.sum().backward(retain_graph=True)
        return y


@pytest.mark.usefixtures("few_steps")
def test_measuring_restores_gradients_that_the_model_itself_computes():
    model = BackwardInForward()
    model.block[0].weight.grad = torch.ones_like(model.block[0].weight)
    accelerate(model, torch.rand(2, 3, 6, 6), inplace=True, measure=True)
    assert torch.equal(model.block[0].weight.grad, torch.ones_like(model.block[0].weight))
    assert model.block[1].weight.grad is None


@pytest.mark.usefixtures("few_steps")
def test_a_model_without_trainable_parameters_is_measured_by_its_forward_pass():
    _, report = accelerate(block().requires_grad_(False), torch.rand(2, 3, 6, 6), measure=True)
    assert report.speedup > 0
