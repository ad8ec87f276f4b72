"""The strict operators, which serve layers in eager mode on the CPU, against the ordinary route."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.functional import batch_norm
from batchnorm.ops import ACTIVATIONS, strict

pytestmark = pytest.mark.skipif(not strict.AVAILABLE, reason="no compiled operators in this build")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NATIVE = strict._native
NODES = {"python": "StrictTrainFunctionBackward"}
if NATIVE is not None:
    NODES["native"] = "torch::autograd::CppNode<batchnorm::node::BatchNorm>"


class Run:
    """The results of one training step and one evaluation of `batch_norm`, on fresh buffers."""

    def __init__(
        self, dtype: torch.dtype, *, vectors: torch.dtype | None = None, layout: torch.memory_format, residual: bool,
        needed: tuple[str, ...] = ("x", "weight", "bias", "residual"), affine: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def like_x() -> Tensor:
            return random(4, 3, 5, 2).to(dtype).contiguous(memory_format=layout)

        inputs = {"x": like_x(), "weight": random(3).to(vectors or dtype), "bias": random(3).to(vectors or dtype)}
        if not affine:
            inputs = {"x": inputs["x"]}
        if residual:
            inputs["residual"] = like_x()
        for name in inputs.keys() & set(needed):
            inputs[name].requires_grad_()
        x = inputs.pop("x")
        running = [torch.zeros(3, dtype=vectors or dtype), torch.ones(3, dtype=vectors or dtype), torch.tensor(2)]
        options = {"num_batches_tracked": running[2], **inputs, **options}
        self.y = batch_norm(x, *running[:2], training=True, **options)
        self.versions = [t._version for t in running]
        wanted = [t for t in (x, *inputs.values()) if t.requires_grad]
        dy = like_x()
        first = torch.autograd.grad(self.y, wanted, dy, retain_graph=True)
        self.results = [self.y, *first, *running]
        with torch.no_grad():
            self.results.append(batch_norm(x, *running[:2], **options))
            self.results.append(batch_norm(x, *running[:2], training=True, **options))
        if dtype == torch.float64:
            self.results += self._second(self.y, wanted, dy)
        fixed = batch_norm(x, *running[:2], **options)  # running statistics are constants, which may change
        running[1].add_(1.0)
        self.results += [fixed, *torch.autograd.grad(fixed, wanted, dy, retain_graph=True)]
        if dtype == torch.float64:
            self.results += self._second(fixed, wanted, dy)

    @staticmethod
    def _second(y: Tensor, wanted: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y, wanted, dy, create_graph=True)
        total = y.square().sum() + sum(t.square().sum() for t in first)
        return torch.autograd.grad(total, wanted)

    @property
    def node(self) -> str:
        return str(self.y.grad_fn.name())


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Return a context without strict operators."""

    class Ordinary:
        def __enter__(self) -> None:
            monkeypatch.setattr(strict, "AVAILABLE", False)

        def __exit__(self, *_: object) -> None:
            monkeypatch.setattr(strict, "AVAILABLE", True)

    return Ordinary


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use the node in Python or in C++, and return its name."""
    monkeypatch.setattr(strict, "_native", NATIVE if request.param == "native" else None)
    return NODES[request.param]


CALLS: dict[str, dict[str, Any]] = {
    **{activation: {"activation": activation} for activation in ACTIVATIONS},
    **{f"{activation}, residual": {"activation": activation, "residual": True} for activation in ACTIVATIONS},
    "channels-last": {"layout": torch.channels_last, "activation": "relu", "residual": True},
    "float32 vectors": {"vectors": torch.float32},
    "cumulative": {"momentum": None},
    "skip": {"on_nonfinite": "skip"},
    "not affine": {"affine": False},
    "no update": {"update_running_stats": False},
    "x alone": {"needed": ("x",), "activation": "relu"},
    "weight alone": {"needed": ("weight",), "activation": "relu"},
    "residual alone": {"needed": ("residual",), "residual": True, "activation": "silu"},
    "bias and residual": {"needed": ("bias", "residual"), "residual": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_step_gives_the_same_bits_as_on_the_ordinary_route(
    dtype: torch.dtype, call: str, ordinary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"layout": torch.contiguous_format, "residual": False, **CALLS[call]}
    if dtype == torch.float64:
        options.pop("vectors", None)
    with ordinary():
        expected = Run(dtype, **options)
    for name, node in NODES.items():
        monkeypatch.setattr(strict, "_native", NATIVE if name == "native" else None)
        found = Run(dtype, **options)
        assert found.node == node != expected.node
        assert found.versions == expected.versions
        for result, other in zip(found.results, expected.results, strict=True):
            assert result.dtype == other.dtype
            assert result.stride() == other.stride()
            assert torch.equal(result, other)


X = torch.randn(4, 3)


def buffers() -> dict[str, Any]:
    return {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}


REFUSED: dict[str, tuple[Any, ...]] = {
    "float64 weight": (X, {"weight": torch.ones(3, dtype=torch.float64)}),
    "half weight": (X, {"weight": torch.ones(3, dtype=torch.float16)}),
    "half residual": (X, {"residual": X.half()}),
    "residual that broadcasts": (X, {"residual": X[:1]}),
    "float64 variance": (X, {"running_var": torch.ones(3, dtype=torch.float64)}),
    "other number of channels": (X, {"bias": torch.ones(4)}),
    "buffer of another device": (X, {"running_mean": torch.zeros(3, device="meta")}),
    "one value per channel": (X[:1], {}),
    "expanded buffer": (X, {"running_var": torch.ones(1).expand(3)}),
    "buffer that requires a gradient": (X, {"running_var": torch.ones(3, requires_grad=True)}),
    "unknown activation": (X, {"activation": "swoosh"}),
    "option that cannot be hashed": (X, {"on_nonfinite": ["skip"]}),
    "unknown on_single": (X, {"on_single": "skip"}),
    "infinite alpha": (X, {"alpha": float("inf")}),
    "channel_dim of 0": (X, {"channel_dim": 0}),
    "eps of zero": (X, {"eps": 0.0}),
    "eps below zero": (X, {"eps": -1e-3}),
    "counter without which no average": (X, {"num_batches_tracked": None, "momentum": None}),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("node")
def test_an_error_is_that_of_the_ordinary_route_and_nothing_changes(case: str, gradient: bool, ordinary: Any) -> None:
    x, wrong = REFUSED[case]
    messages, x = [], x.clone().requires_grad_(gradient)
    for context in (nullcontext, ordinary):
        arguments = buffers() | wrong
        before = {name: arguments[name] for name in buffers() if arguments[name] is not None}
        before = {name: t.clone() for name, t in before.items() if not t.is_meta}
        with context(), pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            batch_norm(x, training=True, **arguments)
        messages.append((error.type, str(error.value)))
        assert all(torch.equal(arguments[name], t) for name, t in before.items())
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("node")
def test_eps_of_zero_is_an_error_only_in_training() -> None:
    layer = batchnorm.BatchNorm1d(3)
    layer.eps = 0.0
    with pytest.raises(ValueError, match="expects eps > 0"):
        layer(X)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.eval()(X), X)


def test_the_ordinary_route_serves_what_is_unusual_but_right(node: str) -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    layer.num_batches_tracked = torch.tensor(0.0)
    y = layer(x)
    assert y.grad_fn.name() != node
    assert layer.num_batches_tracked == 1


@pytest.mark.usefixtures("node")
def test_an_error_of_a_hook_is_raised_and_the_batch_counts_once() -> None:
    def refuse(t: Tensor) -> Tensor:
        raise RuntimeError("no memory left")

    layer, x = batchnorm.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    with saved_tensors_hooks(refuse, lambda t: t), pytest.raises(RuntimeError, match="no memory left"):
        layer(x)
    assert layer.num_batches_tracked == 1


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators_of_the_contract(node: str) -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    with _Names() as forward:
        layer(x)
    y = layer(x)
    assert y.grad_fn.name() == node
    with _Names() as backward:
        y.sum().backward()
    assert {"batchnorm::train_forward", "batchnorm::update_running_"} <= forward.names
    assert "batchnorm::train_backward" in backward.names
    assert not any("strict" in name for name in forward.names | backward.names)


def test_gradients_of_several_upstreams_at_once_are_those_of_each(node: str) -> None:
    x, dys = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 6, 3, dtype=torch.float64)
    y = batchnorm.BatchNormAct1d(3, dtype=torch.float64, activation="silu")(x)
    assert y.grad_fn.name() == node

    def each() -> Iterator[Tensor]:
        for dy in dys:
            yield torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    expected = torch.stack(list(each()))
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(y, x, dys, True, create_graph, is_grads_batched=True)
        torch.testing.assert_close(found, expected)
