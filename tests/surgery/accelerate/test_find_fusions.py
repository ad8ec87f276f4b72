"""Where nothing may be fused, and why; and that whatever fails leaves the model as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.accelerate.accelerate import accelerate
from tests.surgery import networks


class Block(nn.Module):
    """One layer, an activation, and a `forward` that each test gives."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.bn, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.identity, self.hardtanh = nn.Identity(), nn.Hardtanh(0, 6)
        self.register_buffer("counter", torch.zeros(()))
        self.steps = 0
        self.kept: list[Any] = []
        # In a class of its own, as a forward is: on the instance it would be left alone for that.
        self.__class__ = type("Block", (Block,), {"forward": forward})


def plain(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(x))


def fused_in(
    forward: Callable[..., Any], inputs: int = 1, example: bool = True, gradients: bool = True
) -> tuple[dict[str, str], str]:
    """Return the fusions in a block, and the first reason; check that the block computes the same."""
    block = Block(forward).double()
    xs = [torch.randn(6, 4, dtype=torch.float64) for _ in range(inputs)]
    fast, report = accelerate(block, tuple(xs) if example else None)
    assert {type(fast.bn), type(fast.bn2)} == {bn.BatchNorm1d}
    for training in (True, False, True):
        ours, theirs = [x.clone().requires_grad_() for x in xs], [x.clone().requires_grad_() for x in xs]
        values = []
        for model, inputs_ in ((fast, ours), (block, theirs)):
            torch.manual_seed(3)
            random.seed(3)
            y = model.train(training)(*[x * 1 for x in inputs_])  # not leaves: they may be changed
            if gradients:
                (y if isinstance(y, Tensor) else y[0]).square().sum().backward()
            values.append((y, [x.grad for x in inputs_]))
        assert_close(values[0], values[1])
    assert_close(dict(fast.state_dict()), dict(block.state_dict()))
    assert_close([p.grad for p in fast.parameters()], [p.grad for p in block.parameters()])
    return {path: str(fused) for path, fused in report.fused.items()}, report.changed[0].reason


def through_identity(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.identity(self.bn(x)))


def both_sides(self: Block, x: Tensor, y: Tensor) -> Tensor:
    return self.relu(self.bn(x) + self.bn2(y))


def twice(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(self.relu(self.bn(x))))


def method(self: Block, x: Tensor, y: Tensor) -> Tensor:
    return self.bn(x).add_(y).relu_()


def functions(self: Block, x: Tensor) -> Tensor:
    return F.hardswish(self.bn2(F.gelu(self.bn(x))))


def other_functions(self: Block, x: Tensor) -> Tensor:
    return F.elu(self.bn2(F.hardtanh(self.bn(x), 0, 6)), 0.5, inplace=True)


def hardtanh_layer(self: Block, x: Tensor) -> Tensor:
    return self.hardtanh(self.bn(x))


def methods(self: Block, x: Tensor) -> Tensor:
    return self.bn2(self.bn(x).tanh()).sigmoid()


def added_and_shared(self: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = y + self.bn(x)
    return self.relu(both), both


def dropout_before(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(F.dropout(x, 0.0)))


def dropout_layer(self: Block, x: Tensor) -> Tensor:
    return self.drop(self.relu(self.bn(x)))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (plain, {"bn": "relu"}),
        (through_identity, {"bn": "relu"}),
        (both_sides, {"bn": "residual + relu"}),
        (twice, {"bn": "relu"}),
        (method, {"bn": "residual + relu"}),
        (functions, {"bn": "gelu", "bn2": "hardswish"}),
        (other_functions, {"bn": "relu6", "bn2": "elu"}),
        (hardtanh_layer, {"bn": "relu6"}),
        (methods, {"bn": "tanh", "bn2": "sigmoid"}),
        (added_and_shared, {"bn": "residual"}),
        (dropout_layer, {"bn": "relu"}),
    ],
)
def test_fused_operations(forward: Callable[..., Any], expected: dict[str, str]) -> None:
    inputs = forward.__code__.co_argcount - 1
    assert fused_in(forward, inputs)[0] == expected
    assert fused_in(forward, inputs, example=False)[0] == expected


def functional_dropout(self: Block, x: Tensor) -> Tensor:
    return F.dropout(self.relu(self.bn(x)), training=self.training)


def mode(self: Block, x: Tensor) -> Tensor:
    x = self.relu(self.bn(x))
    return x * 2 if self.training else x


def values_decide(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(x)) if x.sum() < 1e9 else x


def shapes_decide(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(x)) * int(x.shape[0])


def python_random(self: Block, x: Tensor) -> Tensor:
    scale = 2.0 if random.random() < 0.5 else 1.0
    return self.relu(self.bn(x)) * scale


def torch_random(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(x)) * (2.0 if torch.rand(()).item() < 0.5 else 1.0)


def constant(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(x)) * torch.ones(4, dtype=torch.float64)


def no_gradients(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.mean()
    return self.relu(self.bn(x)) * scale


def gradients(self: Block, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = self.bn(x)
    return self.relu(x)


def without_autocast(self: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.relu(self.bn(x))


def checkpointed(self: Block, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=False)


def counts(self: Block, x: Tensor) -> Tensor:
    self.steps += 1
    return self.relu(self.bn(x))


def keeps(self: Block, x: Tensor) -> Tensor:
    y = self.relu(self.bn(x))
    self.kept = [*self.kept[-1:], y.detach()]
    return y


def appends(self: Block, x: Tensor) -> Tensor:
    self.kept.append(0)
    return self.relu(self.bn(x))


def asks_within(self: Block, x: Tensor) -> Tensor:
    y = self.relu(self.bn(x))
    return y[0] if isinstance(y, tuple) else y


def parts(self: Block, x: Tensor) -> Tensor:
    return self.relu(self.bn(torch.stack([row * 2 for row in x])))


def global_mode(self: Block, x: Tensor) -> Tensor:
    y = self.relu(self.bn(x))
    return y * 1.5 if torch.is_grad_enabled() else y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (functional_dropout, "the model (Block) does not compute the same in training and in evaluation"),
        (mode, "the model (Block) does not compute the same in training and in evaluation"),
        (global_mode, "the model (Block) does not compute the same in training and in evaluation"),
        (values_decide, "the model (Block) branches on shapes or values in its forward"),
        (shapes_decide, "the model (Block) branches on shapes or values in its forward"),
        (python_random, "the model (Block) draws random numbers in its forward"),
        (torch_random, "the model (Block) draws random numbers in its forward"),
        (constant, "the model (Block) uses a tensor that is neither argument, parameter nor buffer"),
        (no_gradients, "the model (Block) changes how gradients, autocast or saved tensors are handled"),
        (gradients, "the model (Block) changes how gradients, autocast or saved tensors are handled"),
        (without_autocast, "the model (Block) changes how gradients, autocast or saved tensors are handled"),
        (counts, "the model (Block) changes its own attributes in its forward"),
        (keeps, "the model (Block) changes its own attributes in its forward"),
        (appends, "the model (Block) changes its own attributes in its forward"),
        (asks_within, "the model (Block) checks the type of a value in its forward"),
        (parts, "the model (Block) iterates over a value of unknown length in its forward"),
    ],
)
def test_operations_that_a_trace_would_lose_are_left(forward: Callable[..., Any], reason: str) -> None:
    for example in (True, False):
        fused, why = fused_in(forward, example=example)
        assert fused == {}
        assert why.startswith(reason)


def test_a_checkpoint_is_not_lost() -> None:
    for inputs in (None, torch.randn(6, 4)):  # not compared: torch's layer counts each batch twice, ours once
        report = accelerate(Block(checkpointed), inputs).report
        assert not report.fused
        assert "changes how gradients, autocast or saved tensors are handled" in report.changed[0].reason


def two_places(self: Block, x: Tensor) -> Tensor:
    y = self.bn(x)
    return self.relu(y) + y


def in_place_unseen(self: Block, x: Tensor) -> Tensor:
    y = self.bn(x)
    self.relu_(y)
    return y


def added_into(self: Block, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    y += self.bn(x)
    return y + z


def input_changes(self: Block, x: Tensor, y: Tensor) -> Tensor:
    x = x * 1
    z = self.bn(x)
    self.relu_(x)
    return self.relu(z + y) + x


def view_changes(self: Block, x: Tensor, y: Tensor) -> Tensor:
    base = x * 1
    view = base[:]
    z = self.bn(view)
    base.relu_()
    return self.relu(z + y) + base


def called_between(self: Block, x: Tensor, y: Tensor) -> Tensor:
    z = self.bn(x)
    again = self.bn(y)
    return self.relu(z + y) * again


def another_layer(self: Block, x: Tensor) -> Tensor:
    return self.drop(self.bn(x))


def doubled(self: Block, x: Tensor) -> Tensor:
    y = self.bn(x)
    return self.relu(y + y)


def tanh_gelu(self: Block, x: Tensor) -> Tensor:
    return F.gelu(self.bn(x), approximate="tanh")


def scaled_addition(self: Block, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(self.bn(x), y, alpha=2)


def unused(self: Block, x: Tensor) -> Tensor:
    self.bn(x)
    return x * 1


def not_called(self: Block, x: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (two_places, "its result goes to several places"),
        (in_place_unseen, "its result goes to several places"),
        (added_into, "its result goes to iadd"),
        (input_changes, "its input may change before its result is added"),
        (view_changes, "its input may change before its result is added"),
        (another_layer, "its result goes to drop (Dropout)"),
        (doubled, "its result goes to several places"),
        (tanh_gelu, "its result goes to gelu"),
        (scaled_addition, "its result goes to add"),
        (unused, "its result is not used"),
        (not_called, "no call of it can be traced"),
    ],
)
def test_operations_that_fusion_would_change_are_left(forward: Callable[..., Any], reason: str) -> None:
    changes = forward in (input_changes, view_changes)  # what autograd needs, as torch says at the backward
    for example in (True, False):
        fused, why = fused_in(forward, forward.__code__.co_argcount - 1, example, gradients=not changes)
        assert "bn" not in fused
        assert why == reason


def test_statistics_move_in_the_order_of_the_calls() -> None:
    fused, _ = fused_in(called_between, 2)
    assert fused == {}


def test_hooks_on_the_way_are_not_passed_by() -> None:
    block = networks.InvertedResidual(4, 4, 1, 2)
    block.conv.register_forward_hook(lambda m, a, y: y * 3)
    fast, report = accelerate(block)
    assert set(report.fused) == {"conv.0.1", "conv.1.1"}
    x = torch.randn(2, 4, 5, 5)
    assert_close(fast(x), block(x), rtol=1e-5, atol=1e-5)
    # Added afterwards, they count as well.
    fast, report = accelerate(networks.InvertedResidual(4, 4, 1, 2))
    assert set(report.fused) == {"conv.0.1", "conv.1.1", "conv.3"}
    fast.conv.register_forward_hook(lambda m, a, y: y * 0)
    assert torch.equal(fast(x), x)


def test_lists_are_understood_with_example_inputs_only() -> None:
    model, x = networks.DenseNet().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    report = accelerate(model).report
    assert set(report.fused) == {"transition.0", "norm5"}
    assert "pass example_inputs to make it known" in report.changed[0].reason
    assert len(accelerate(model, x).report.fused) == 10
