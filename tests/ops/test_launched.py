"""The node in C++ with functions in Python that compute each pass, as for tensors on a GPU.

Here, the functions call the operators of the contract on the CPU, so that a call has the bits of the ordinary route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.functional import batch_norm
from batchnorm.ops import ACTIVATIONS, strict, triton
from tests.ops import native_node
from tests.ops import test_strict as cases

pytestmark = pytest.mark.skipif(strict._native is None, reason="no node in C++ in this build")

NODE = "torch::autograd::CppNode<batchnorm::node::BatchNorm>"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = tuple(ACTIVATIONS)
_ops = torch.ops.batchnorm


class Functions:
    """The functions that the node calls, the passes that they have computed, and the keys of their calls.

    `before` is called first, with the pass and its arguments. If it returns False, so does the function.
    """

    def __init__(self) -> None:
        self.passes: list[str] = []
        self.keys: list[bytes] = []
        self.addresses: list[tuple[int | None, ...]] = []
        self.before: Callable[[str, tuple[Any, ...]], bool] = lambda name, arguments: True

    def start(self, name: str, key: bytes, tensors: tuple[Tensor | None, ...], *others: Any) -> bool:
        assert self.keys[-1] == key
        assert self.addresses[-1] == tuple(None if t is None else t.data_ptr() for t in tensors)
        if not self.before(name, (*tensors, *others)):
            return False
        self.passes.append(name)
        getattr(self, name)(*tensors, *others)
        return True

    def start_again(self, key: bytes, addresses: tuple[int | None, ...]) -> bool:
        self.keys.append(key)
        self.addresses.append(addresses)
        return False

    @staticmethod
    def train_forward(
        x: Tensor, residual: Tensor | None, y: Tensor, mean: Tensor, mean_low: Tensor, var: Tensor, weight: Any,
        bias: Any, running_mean: Any, running_var: Any, tracked: Any, eps: float, activation: int, parameter: float,
        momentum: float | None, skip_nonfinite: bool,
    ) -> None:  # fmt: skip
        found = _ops.train_forward(x, weight, bias, residual, eps, _NAMES[activation], parameter)
        for result, value in zip((y, mean, mean_low, var), found, strict=True):
            result.copy_(value)
        if running_mean is not None:
            m = x.numel() // x.shape[1]
            running = (t if t is None else t.detach() for t in (running_mean, running_var, tracked))
            _ops.update_running_(*running, *found[1:], m, None, momentum, skip_nonfinite)

    @staticmethod
    def normalize(
        x: Tensor, residual: Tensor | None, y: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float,
        activation: int, parameter: float,
    ) -> None:  # fmt: skip
        y.copy_(_ops.normalize(x, mean, None, var, weight, bias, residual, None, eps, _NAMES[activation], parameter))

    @staticmethod
    def backward(
        x: Tensor, dy: Tensor, residual: Any, y: Any, dx: Tensor, dz: Tensor | None, mean: Tensor, mean_low: Any,
        var: Tensor, weight: Any, bias: Any, dbias: Tensor, dweight: Tensor, eps: float, activation: int,
        parameter: float,
    ) -> None:  # fmt: skip
        kept, attributes = (dy, x, residual, y, mean, mean_low, var, weight, bias), (eps, _NAMES[activation], parameter)
        if mean_low is None:
            found = _ops.normalize_backward(*kept, None, 1, *attributes, dz is not None)
        else:
            found = _ops.train_backward(*kept, *attributes, dz is not None)
        for result, value in zip((dx, dweight, dbias, dz), found, strict=True):
            if result is not None:
                result.copy_(value)


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Functions]:
    """Let functions compute the passes of all layers."""
    native, found = strict._native, Functions()
    monkeypatch.setattr(strict, "_native", native_node.launched(native))
    native.set_functions(found.start, found.start_again)
    yield found
    native.set_functions(triton.start, triton.start_again)


ordinary = cases.ordinary


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", cases.CALLS)
def test_a_step_by_functions_gives_the_same_bits_as_on_the_ordinary_route(
    dtype: torch.dtype, call: str, functions: Functions, ordinary: Any
) -> None:
    options = {"layout": torch.contiguous_format, "residual": False, **cases.CALLS[call]}
    with ordinary():
        expected = cases.Run(dtype, **options)
    assert functions.passes == []
    found = cases.Run(dtype, **options)
    assert found.node == NODE
    assert functions.passes[0] == "train_forward"
    for result, other in zip(found.results, expected.results, strict=True):
        assert result.dtype == other.dtype
        assert result.stride() == other.stride()
        assert torch.equal(result, other)
    for version, other in zip(found.versions, expected.versions, strict=True):
        assert (version > 0) == (other > 0)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("case", cases.REFUSED)
def test_an_error_by_functions_is_that_of_the_ordinary_route(
    case: str, gradient: bool, functions: Functions, ordinary: Any
) -> None:
    cases.test_an_error_is_that_of_the_ordinary_route_and_nothing_changes(case, gradient, ordinary)
    assert functions.passes == []


def _run(x: Tensor, layer: torch.nn.Module, dy: Tensor | None = None) -> list[Tensor]:
    inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
    y = layer(x)
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if dy is None else dy), *layer.buffers()]


_UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "float64": lambda: torch.randn(4, 3, 2, dtype=torch.float64),
    "sliced": lambda: torch.randn(4, 6, 2)[:, ::2],
    "transposed": lambda: torch.randn(4, 2, 3).transpose(1, 2)[::2],
    "empty": lambda: torch.randn(0, 3, 2),
}


@pytest.mark.parametrize("case", _UNUSUAL)
def test_what_the_kernels_do_not_take_is_left_to_the_ordinary_route(
    case: str, functions: Functions, ordinary: Any
) -> None:
    x = _UNUSUAL[case]().requires_grad_()
    found = _run(x, batchnorm.BatchNorm1d(3, dtype=x.dtype))
    assert functions.passes == []
    with ordinary():
        expected = _run(x, batchnorm.BatchNorm1d(3, dtype=x.dtype))
    assert all(map(torch.equal, found, expected))


def test_an_upstream_gradient_in_another_layout_goes_to_the_operators(functions: Functions, ordinary: Any) -> None:
    x, dy = torch.randn(4, 3, 5, requires_grad=True), torch.randn(5, 3, 4).permute(2, 1, 0)
    found = _run(x, batchnorm.BatchNormAct1d(3, activation="silu"), dy)
    assert functions.passes == ["train_forward"]
    with ordinary():
        expected = _run(x, batchnorm.BatchNormAct1d(3, activation="silu"), dy)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["train_forward", "backward"])
def test_a_pass_that_does_not_start_is_computed_otherwise_once(name: str, functions: Functions, ordinary: Any) -> None:
    functions.before = lambda called, arguments: called != name
    x = torch.randn(4, 3, requires_grad=True)
    found = _run(x, batchnorm.BatchNorm1d(3))
    with ordinary():
        expected = _run(x, batchnorm.BatchNorm1d(3))
    assert functions.passes == ["train_forward", "backward"][: name == "backward"]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_an_error_of_a_function_is_raised_as_it_is(
    error: BaseException, training: bool, gradient: bool, functions: Functions
) -> None:
    def fail(name: str, arguments: tuple[Any, ...]) -> bool:
        raise error

    functions.before = fail
    layer = batchnorm.BatchNorm1d(3).train(training).requires_grad_(gradient)
    with pytest.raises(type(error)) as raised:
        layer(torch.randn(4, 3))
    assert raised.value is error
    functions.before = lambda name, arguments: True
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == training


def test_an_error_of_backward_leaves_the_gradients_to_the_operators(functions: Functions) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = batchnorm.BatchNorm1d(3)(x)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)

    def fail(name: str, arguments: tuple[Any, ...]) -> bool:
        raise RuntimeError("device")

    functions.before = fail
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(found, expected)


def test_second_derivatives_and_transforms_are_those_of_the_ordinary_route(functions: Functions, ordinary: Any) -> None:
    def derivatives() -> list[Tensor]:
        x = torch.linspace(-1, 1, 24).reshape(4, 3, 2).sin().requires_grad_()
        layer = batchnorm.BatchNormAct1d(3, activation="gelu", track_running_stats=False)
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found = list(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()]))
        state = {name: t.detach() for name, t in layer.state_dict().items()}
        found.append(grad(lambda x: functional_call(layer, state, (x,)).square().sum())(x.detach()))
        return found

    found = derivatives()
    with ordinary():
        expected = derivatives()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_running_statistics_are_updated_once_with_activation_checkpointing(
    reentrant: bool, functions: Functions
) -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    updated: list[bool] = []

    def record(name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "train_forward":
            updated.append(all(t is not None for t in arguments[8:11]))
        return True

    functions.before = record
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert updated == [True, False]
    assert layer.num_batches_tracked == 1


_DIFFERENT: dict[str, Callable[[], object]] = {
    "shape": lambda: _call(input=torch.zeros(5, 3)),
    "strides": lambda: _call(input=torch.zeros(4, 3, 5)),
    "channels last": lambda: _call(input=torch.zeros(4, 5, 3).transpose(1, 2)),
    "dtype": lambda: _call(input=torch.zeros(4, 3, dtype=torch.float16)),
    "dtype of the weight": lambda: _call(input=torch.zeros(4, 3, dtype=torch.float16), weight=torch.ones(3).half()),
    "address": lambda: _call(input=torch.zeros(13)[1:].view(4, 3)),
    "address of the weight": lambda: _call(weight=torch.zeros(4)[1:]),
    "no weight": lambda: _call(weight=None),
    "no bias": lambda: _call(bias=None),
    "residual": lambda: _call(residual=torch.zeros(4, 3)),
    "eps": lambda: _call(eps=1e-3),
    "activation": lambda: _call(activation="relu"),
    "parameter": lambda: _call(activation="leaky_relu", negative_slope=0.1),
    "another parameter": lambda: _call(activation="leaky_relu", negative_slope=0.2),
    "momentum": lambda: _call(momentum=0.2),
    "no momentum": lambda: _call(momentum=None, num_batches_tracked=torch.tensor(0)),
    "skipped": lambda: _call(on_nonfinite="skip"),
    "evaluation": lambda: _call(training=False),
}


def _call(**options: Any) -> Tensor:
    given = {"input": torch.zeros(4, 3), "weight": torch.ones(3), "bias": torch.zeros(3), "training": True}
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    return batch_norm(**{**statistics, **given, **options})


def test_calls_that_differ_in_more_than_addresses_have_different_keys(functions: Functions) -> None:
    for call in (_call, *_DIFFERENT.values()):
        call()
    assert len(functions.keys) == len(_DIFFERENT) + 1
    assert len(set(functions.keys)) == len(functions.keys)


def test_calls_that_differ_in_addresses_have_the_same_key(functions: Functions) -> None:
    layer = batchnorm.BatchNormAct1d(3, activation="silu")
    held = []
    for _ in range(2):
        x, residual = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
        y = layer(x, residual)
        dy = torch.ones_like(y)
        y.backward(dy)
        held += [x, residual, y, dy, x.grad]
        _call()
    assert functions.passes == ["train_forward", "backward", "train_forward"] * 2
    assert functions.keys[:3] == functions.keys[3:]
    for before, after in zip(functions.addresses[:3], functions.addresses[3:], strict=True):
        assert [p is None for p in before] == [p is None for p in after]
        assert before[0] != after[0]


def test_rows_of_statistics_are_aligned_for_the_kernels(functions: Functions) -> None:
    addresses: list[int] = []

    def record(name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "train_forward":
            addresses.extend(t.data_ptr() for t in arguments[3:6])
        return True

    functions.before = record
    batchnorm.BatchNorm1d(3)(torch.randn(4, 3))
    assert len(addresses) == 3
    assert all(address % 16 == 0 for address in addresses)


def test_running_statistics_that_change_before_backward_are_those_of_forward(functions: Functions) -> None:
    layer, x = batchnorm.BatchNorm1d(3).eval(), torch.randn(4, 3, requires_grad=True)
    y = layer(x)
    layer.running_var.fill_(4.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert functions.passes == ["normalize", "backward"]
    torch.testing.assert_close(dx, torch.ones_like(x))


@pytest.mark.parametrize("place", ["x", "weight", "running_var"])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_tensor_whose_memory_was_freed_is_an_error(place: str, gradient: bool, functions: Functions) -> None:
    x = torch.randn(4, 3)
    tensors = {"weight": torch.ones(3), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    (x if place == "x" else tensors[place]).untyped_storage().resize_(0)
    tensors["weight"].requires_grad_(gradient)
    with pytest.raises(RuntimeError, match="memory allocated"):
        batch_norm(x, **tensors, training=True)
    assert functions.passes == []
    x, weight = torch.randn(4, 3, requires_grad=True), torch.ones(3)
    y = batch_norm(x, torch.zeros(3), torch.ones(3), weight, training=True)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory allocated"):
        torch.autograd.grad(y, x, torch.ones_like(y))
