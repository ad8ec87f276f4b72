"""Batch renormalization under activation checkpointing and compilation: r and d are those of the first pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.nn import BatchRenorm2d
from batchnorm.ops import renorm

Call = Callable[[Tensor], Tensor]

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])

# torch's own compiler loads what torch deprecates.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
        self.norm, self.last = BatchRenorm2d(4), BatchRenorm2d(3, rmax=1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()))


def assert_recomputes(wrap: Callable[[Block], Call], calls: int = 1, rtol: float = 1e-11) -> None:
    """Check that three steps of `wrap(block)` agree with `block` without checkpointing."""
    plain = Block().double()
    block = copy.deepcopy(plain)
    call = wrap(block)
    for number in (1, 2, 3):
        data = torch.randn(calls, 2, 4, 3, 6, 6, dtype=torch.float64)
        results = []
        for module, forward in ((plain, plain), (block, call)):
            module.zero_grad()
            leaves = [x.clone().requires_grad_() for x, _ in data]
            outputs = [forward(leaf) for leaf in leaves]
            torch.autograd.backward(outputs, [dy for _, dy in data])
            gradients = [p.grad.clone() for p in module.parameters()]
            results.append([*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves), *gradients])
        assert_close(results[1], results[0], rtol=rtol, atol=1e-11)
        assert_close(block.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
        assert block.norm.num_batches_tracked == number * calls


@pytest.mark.parametrize("calls", [1, 4])
@REENTRANT
def test_checkpointing_keeps_the_r_and_d_of_the_first_pass(reentrant: bool, calls: int) -> None:
    assert_recomputes(lambda block: partial(checkpoint, block, use_reentrant=reentrant), calls)


@REENTRANT
def test_nested_checkpoints(reentrant: bool) -> None:
    def wrap(block: Block) -> Call:
        inner = partial(checkpoint, block, use_reentrant=reentrant)
        return lambda x: checkpoint(inner, x, use_reentrant=reentrant)

    assert_recomputes(wrap)


@REENTRANT
def test_two_calls_with_the_same_batch(reentrant: bool) -> None:
    # Their statistics are the same, their r and d are not.
    outcomes = []
    for around in (lambda f: f, lambda f: partial(checkpoint, f, use_reentrant=reentrant)):
        layer = BatchRenorm2d(3, dtype=torch.float64)
        for _ in range(3):
            x = torch.linspace(-1, 4, 72, dtype=torch.float64).reshape(2, 3, 4, 3).requires_grad_()
            first = around(layer)(x)
            second = around(layer)(x * 1.0)
            (first.pow(3).sum() + second.pow(2).cos().sum()).backward()
        outcomes.append([x.grad, *layer.buffers()])
    assert_close(*outcomes, rtol=1e-11, atol=1e-11)


@BACKENDS
@REENTRANT
def test_checkpointing_around_a_compiled_layer(reentrant: bool, backend: str) -> None:
    def wrap(block: Block) -> Call:
        return partial(checkpoint, torch.compile(block, backend=backend, fullgraph=True), use_reentrant=reentrant)

    assert_recomputes(wrap)


@BACKENDS
def test_checkpointing_inside_a_compiled_function(backend: str) -> None:
    def wrap(block: Block) -> Call:
        return torch.compile(partial(checkpoint, block, use_reentrant=False), backend=backend, fullgraph=True)

    assert_recomputes(wrap)


def test_reentrant_checkpointing_inside_a_compiled_function() -> None:
    def wrap(block: Block) -> Call:  # torch breaks the graph there
        return torch.compile(partial(checkpoint, block, use_reentrant=True), backend="aot_eager")

    assert_recomputes(wrap)


@BACKENDS
def test_a_compiled_layer(backend: str) -> None:
    assert_recomputes(lambda block: torch.compile(block, backend=backend, fullgraph=True), calls=2)


def test_a_first_pass_that_cannot_be_found_is_an_error() -> None:
    layer = BatchRenorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    noise = iter([0.0, 1.0])
    y = checkpoint(lambda x: layer(x + next(noise) * x.detach()), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"BatchRenorm2d expects a call inside backward to repeat .* none of the 1 "):
        y.sum().backward()


def test_old_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renorm, "REMEMBERED", 2)
    layer = BatchRenorm2d(3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    for _ in range(2):
        layer(torch.randn(4, 3, 5, 5))
    with pytest.raises(RuntimeError, match=r"one of its last 2 calls"):
        y.sum().backward()
    assert len(renorm._calls[layer.running_mean]) == 2


def test_a_deleted_layer_leaves_nothing_behind() -> None:
    before = len(renorm._calls)
    layer = BatchRenorm2d(3)
    layer(torch.randn(4, 3, 5, 5))
    assert len(renorm._calls) == before + 1
    del layer
    assert len(renorm._calls) == before


def test_an_overflow_is_recomputed_too() -> None:
    layer = BatchRenorm2d(3, on_nonfinite="skip")
    x = torch.randn(4, 3, 5, 5)
    x[0, 0] = torch.nan
    x.requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad[:, 0].isnan().all() and x.grad[:, 1:].isfinite().all()


def test_an_operator_for_the_compiler_passes_opcheck() -> None:
    vectors = [torch.rand(5) + 0.5 for _ in range(5)]
    arguments = (*vectors, torch.tensor(3.0), torch.tensor(5.0), 1e-5, "BatchRenorm")
    results = torch.library.opcheck(torch.ops.batchnorm.renorm_correction, arguments)
    assert set(results.values()) == {"SUCCESS"}
