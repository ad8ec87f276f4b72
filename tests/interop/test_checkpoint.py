"""Activation checkpointing runs forward twice, but updates running statistics once and gives the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm as bn

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

Call = Callable[[Tensor], Tensor]

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
# The last one partitions the graph as Inductor does. test_compile.py compiles the same operators by Inductor.
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "aot_eager_decomp_partition"])


class Block(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm = bn.BatchNorm2d(4, momentum=momentum)
        self.act = bn.BatchNormAct2d(3, momentum=momentum, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.norm(self.first(x)).relu()), x)


def assert_moves_once(wrap: Callable[[Block], Call], momentum: float | None = 0.1) -> None:
    """Check that two steps of `wrap(block)` agree with `block` without checkpointing."""
    plain = Block(momentum).double()
    block = copy.deepcopy(plain)
    call = wrap(block)
    for number in (1, 2):
        x, dy = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
        results = []
        for module, forward in ((plain, plain), (block, call)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = forward(leaf)
            y.backward(dy)
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
        assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
        assert_close(block.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
        assert block.norm.num_batches_tracked == block.act.num_batches_tracked == number


@pytest.mark.parametrize("momentum", [0.1, None])
@REENTRANT
def test_around_an_eager_layer(reentrant: bool, momentum: float | None) -> None:
    assert_moves_once(lambda block: partial(checkpoint, block, use_reentrant=reentrant), momentum)


@REENTRANT
def test_nested(reentrant: bool) -> None:
    def wrap(block: Block) -> Call:
        inner = partial(checkpoint, block, use_reentrant=reentrant)
        return lambda x: checkpoint(inner, x, use_reentrant=reentrant)

    assert_moves_once(wrap)


@REENTRANT
def test_of_a_sequence(reentrant: bool) -> None:
    def wrap(block: Block) -> Call:
        modules = nn.Sequential(nn.Identity(), block, nn.Identity())
        return lambda x: checkpoint_sequential(modules, 2, x, use_reentrant=reentrant)

    assert_moves_once(wrap)


@BACKENDS
@REENTRANT
def test_around_a_compiled_layer(reentrant: bool, backend: str) -> None:
    def wrap(block: Block) -> Call:
        return partial(checkpoint, torch.compile(block, backend=backend, fullgraph=True), use_reentrant=reentrant)

    assert_moves_once(wrap)


@BACKENDS
def test_inside_a_compiled_function(backend: str) -> None:
    def wrap(block: Block) -> Call:
        return torch.compile(partial(checkpoint, block, use_reentrant=False), backend=backend, fullgraph=True)

    assert_moves_once(wrap)


def test_reentrant_inside_a_compiled_function() -> None:
    def wrap(block: Block) -> Call:  # torch breaks the graph there
        return torch.compile(partial(checkpoint, block, use_reentrant=True), backend="aot_eager")

    assert_moves_once(wrap)


@REENTRANT
def test_a_frozen_layer_stays_frozen(reentrant: bool) -> None:
    layer = bn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with bn.update_running_stats(layer, False):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert layer.num_batches_tracked == 0
    checkpoint(layer.eval(), x, use_reentrant=reentrant).sum().backward()
    assert layer.num_batches_tracked == 0


@REENTRANT
def test_a_forward_that_is_no_recomputation_counts_after_a_backward(reentrant: bool) -> None:
    layer = bn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for _ in range(3):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        layer(x)
    assert layer.num_batches_tracked == 6
