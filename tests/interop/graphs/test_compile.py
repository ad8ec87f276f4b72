"""`torch.compile`: no graph breaks, eager's values and gradients, and one update of the running statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from tests.cases import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "1d": lambda: (bn.BatchNorm1d(3), (5, 3)),
    "1d_length": lambda: (bn.BatchNorm1d(3), (2, 3, 7)),
    "2d": lambda: (bn.BatchNorm2d(3), (4, 3, 5, 5)),
    "3d": lambda: (bn.BatchNorm3d(2), (2, 2, 3, 4, 3)),
    "any_rank": lambda: (bn.BatchNorm(2), (2, 2, 2, 3, 2, 2)),
    "empty_batch": lambda: (bn.BatchNorm2d(3), (0, 3, 5, 5)),
    "momentum=None": lambda: (bn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
    "plain": lambda: (bn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "no_bias": lambda: (bn.BatchNorm2d(3, bias=False), (4, 3, 5, 5)),
    "no_running_statistics": lambda: (bn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    "skip": lambda: (bn.BatchNorm2d(3, on_nonfinite="skip"), (4, 3, 5, 5)),
    "act_1d": lambda: (bn.BatchNormAct1d(3), (5, 3)),
    "act_3d": lambda: (bn.BatchNormAct3d(2), (2, 2, 3, 4, 3)),
    **{
        f"act_{name}": lambda name=name: (bn.BatchNormAct2d(3, activation=name, negative_slope=0.2), (4, 3, 5, 5))
        for name in ACTIVATIONS
    },
}
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYER = pytest.mark.parametrize("layer", LAYERS)


def randomized(layer: nn.Module, training: bool) -> Any:
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(3)
    layer.train(training)
    return layer


def step(call: Callable[..., Tensor], layer: nn.Module, inputs: tuple[Tensor, ...], dy: Tensor) -> dict[str, Any]:
    """Return all results of a forward and backward pass."""
    inputs = tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs)
    layer.zero_grad()
    y = call(*inputs)
    y.backward(dy)
    found = {"y": y.detach(), **{f"d{number}": t.grad for number, t in enumerate(inputs)}}
    found.update({f"d{key}": p.grad.clone() for key, p in layer.named_parameters()})
    return found | {key: t.clone() for key, t in layer.state_dict().items()}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(actual[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        assert actual[key].stride() == value.stride(), key


def inputs_of(layer: str, training: bool) -> tuple[int, ...]:
    """Return with how many inputs a layer is called: x, or x and a residual.

    Of the activations, only pairs are tried: each with a residual in one mode, and without in the other.
    """
    if layer in ("act_1d", "act_3d"):
        return (1, 2)
    if not layer.startswith("act_"):
        return (1,)
    return (1 + (list(LAYERS).index(layer) + training) % 2,)


@TRAINING
@LAYER
def test_layers_compile_without_a_break_and_agree_with_eager(layer: str, training: bool) -> None:
    eager, shape = LAYERS[layer]()
    eager = randomized(eager, training)
    again = copy.deepcopy(eager)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    for calls, number in enumerate(inputs_of(layer, training), 1):
        inputs, dy = tuple(torch.randn(shape) for _ in range(number)), torch.randn(shape)
        actual, expected = step(compiled, again, inputs, dy), step(eager, eager, inputs, dy)
        assert_same(actual, expected, rtol=0, atol=0)
        if training and "num_batches_tracked" in expected and inputs[0].numel():
            assert expected["num_batches_tracked"] == 3 + calls


@pytest.mark.parametrize(
    ("dtype", "layout", "training"),
    [  # every pair of values
        (torch.float64, "channels_last", True),
        (torch.float64, "transposed", False),
        (torch.bfloat16, "channels_last", False),
        (torch.bfloat16, "transposed", True),
        (torch.float16, "channels_last", True),
        (torch.float16, "transposed", False),
    ],
)
def test_dtypes_and_layouts_are_kept(dtype: torch.dtype, layout: str, training: bool) -> None:
    eager = randomized(bn.BatchNormAct2d(3), training)
    eager = eager.double() if dtype == torch.float64 else eager
    again = copy.deepcopy(eager)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    inputs = tuple(torch.randn(4, 3, 5, 6).to(dtype) for _ in range(2))
    inputs = tuple(
        t.contiguous(memory_format=torch.channels_last)
        if layout == "channels_last"
        else t.transpose(0, 3).contiguous().transpose(0, 3)
        for t in inputs
    )
    dy = torch.randn_like(inputs[0])
    actual, expected = step(compiled, again, inputs, dy), step(eager, eager, inputs, dy)
    assert_same(actual, expected, rtol=0, atol=0)
    assert actual["y"].stride() == inputs[0].stride()


class Block(nn.Module):
    """Convolutions, and every way of calling our layers."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = bn.BatchNorm2d(4, momentum=momentum)
        self.act = bn.BatchNormAct2d(4, momentum=momentum, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu()
        return self.act(self.second(y), y).mean((2, 3))


def test_inductor_trains_as_eager_does() -> None:
    layout = torch.channels_last
    eager = Block().double().to(memory_format=layout)
    again = copy.deepcopy(eager)
    compiled = torch.compile(again, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, again)]
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
        dy = torch.randn(4, 4, dtype=torch.float64)
        actual, expected = step(compiled, again, (x,), dy), step(eager, eager, (x,), dy)
        assert_same(actual, expected, rtol=1e-11, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
    assert again.norm.num_batches_tracked == 3
    with torch.no_grad():
        assert_close(compiled.eval()(x), eager.eval()(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("way", "momentum"), [("mark_dynamic", None), ("dynamic=True", 0.1)])
def test_one_graph_works_for_every_batch_size(way: str, momentum: float | None) -> None:
    eager = Block(momentum).double()
    again = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(again, backend=counter, fullgraph=True, dynamic=True if way == "dynamic=True" else None)
    seen = []
    for size in (4, 7, 2, 9):
        x = torch.randn(size, 3, 6, 6, dtype=torch.float64)
        if way == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        dy = torch.randn(size, 4, dtype=torch.float64)
        y, expected = compiled(x), eager(x)
        y.backward(dy)
        expected.backward(dy)
        assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for parameter, its in zip(again.parameters(), eager.parameters(), strict=True):
            assert_close(parameter.grad, its.grad, rtol=1e-11, atol=1e-11)
        assert_close(again.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)
        seen.append(counter.frame_count)
    assert seen == [seen[0]] * 4


def test_one_graph_of_inductor_works_for_every_batch_size() -> None:
    eager = Block().double()
    again = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(again, backend=counter, fullgraph=True)
    for size in (4, 7, 2):
        x = torch.randn(size, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        y, expected = compiled(x), eager(x)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert_close(y, expected, rtol=1e-11, atol=1e-11)
        assert_close(dx, torch.autograd.grad(expected, x, dy)[0], rtol=1e-11, atol=1e-11)
    assert counter.frame_count == 1
    assert_close(again.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)


def test_the_function_compiles_too() -> None:
    def normalize(x: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
        return bn.functional.batch_norm(x, mean, var, training=True, activation="relu", residual=residual)

    x, residual = torch.randn(2, 4, 3, 5)
    running, again = [(torch.zeros(3), torch.ones(3)) for _ in range(2)]
    compiled = torch.compile(normalize, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, *again, residual), normalize(x, *running, residual))
    assert_close(again, running, rtol=0, atol=0)


def test_changes_of_mode_and_update_running_stats_are_noticed() -> None:
    layer = bn.BatchNorm2d(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    compiled(x)
    with bn.update_running_stats(layer, False):
        compiled(x)
    layer.eval()
    compiled(x)
    assert layer.num_batches_tracked == 1
    compiled(x).sum().backward()
    layer.train()
    compiled(x)
    assert layer.num_batches_tracked == 2
    with torch.no_grad():
        compiled(x)
    assert layer.num_batches_tracked == 3


def test_inference_mode_and_autocast() -> None:
    layer = randomized(bn.BatchNormAct2d(3), False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x.bfloat16()), layer(x.bfloat16()))


@pytest.mark.parametrize("option", ["skip", "error"])
def test_the_decision_to_skip_or_to_raise_is_made_at_run_time(option: str) -> None:
    layer = bn.BatchNorm2d(3, on_nonfinite=option)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    compiled(x).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="expects finite") if option == "error" else contextlib.nullcontext():
        compiled(torch.where(x > 1, torch.inf, x))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    compiled(x)
    assert layer.num_batches_tracked == 2


def test_the_error_is_ours_if_a_graph_may_break() -> None:
    compiled = torch.compile(bn.BatchNorm2d(3), backend="aot_eager")
    with pytest.raises(ValueError, match=r"expects weight of shape \[C\] = \[5\] .* Give the layer num_features=5"):
        compiled(torch.randn(4, 5, 6, 6))


# Second derivatives: torch's compiler refuses them itself; with its eager backend ours does.
@TRAINING
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("aot_eager", "does not currently support double backward"),
        ("inductor", "does not currently support double backward"),
        ("eager", "is itself a derivative and has none. .* outside torch.compile"),
    ],
)
def test_double_backward_raises_a_clear_error(backend: str, message: str, training: bool) -> None:
    compiled = torch.compile(bn.BatchNorm2d(3).train(training), backend=backend, fullgraph=True)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)

    def gradient_penalty() -> None:
        (dx,) = torch.autograd.grad(compiled(x).sin().sum(), x, create_graph=True)
        dx.square().sum().backward()

    with pytest.raises(RuntimeError, match=message):
        gradient_penalty()


@TRAINING
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "hessian"])
def test_transforms_inside_a_compiled_function(transform: str, training: bool) -> None:
    # Without gradients of their own: with them the compiler fails for torch's layers, too, under a hessian.
    layer = randomized(bn.BatchNormAct2d(3, activation="silu"), training).double().requires_grad_(False)
    layer.update_running_stats = False

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().mean()

    def function(x: Tensor) -> Tensor:
        if transform == "grad":
            return torch.func.grad(loss)(x)
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (x.cos(),))[1]
        if transform == "vmap":
            return torch.func.vmap(lambda t: layer(t))(torch.stack([x, x.sin()]))
        return torch.func.hessian(loss)(x)

    x = torch.randn(2, 3, 2, 1, dtype=torch.float64)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), function(x), rtol=1e-12, atol=1e-12)
