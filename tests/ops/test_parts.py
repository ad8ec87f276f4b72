"""The operators that compute both halves at once, for masks, groups of samples and rows of weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm import nn
from batchnorm.functional import batch_norm
from batchnorm.ops import parts, routes, strict

pytestmark = pytest.mark.skipif(not strict.takes_parts(torch.ones(1)), reason="no compiled operators in this build")

NODES = {"native": "torch::autograd::CppNode", "python": "PartsFunctionBackward"}
NATIVE = strict._native
N, C = 6, 5
INDEX = torch.tensor([0, 2, 0, 1, 2, 2])


@pytest.fixture(params=["native", "python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use the node in C++ or in Python, and return the start of its name."""
    if request.param == "native" and NATIVE is None:
        pytest.skip("no node in C++ in this build")
    monkeypatch.setattr(strict, "_native", NATIVE if request.param == "native" else None)
    return NODES[request.param]


def refuse(*arguments: Any) -> Any:
    raise AssertionError("the ordinary route")


def mask_with(padding: float) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        mask = torch.arange(x[:, 0].numel()).reshape(N, *x.shape[2:]) % 3 != 0
        padded = torch.where(mask.unsqueeze(1), x, padding) if padding else x
        return nn.BatchNormAct2d(C, activation="silu", dtype=x.dtype)(padded, mask=mask)

    return call


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": mask_with(0.0),
    "ghost": lambda x: nn.GhostBatchNorm2d(C, ghost_size=4, dtype=x.dtype)(x),
    "domain": lambda x: nn.DomainBatchNorm2d(C, num_domains=4, affine_per_domain=True, dtype=x.dtype)(x, INDEX),
    "domain and mask": lambda x: nn.DomainBatchNorm2d(C, num_domains=4, dtype=x.dtype)(x, INDEX, mask=x[:, 0] > -1.0),
    "conditional": lambda x: nn.ConditionalBatchNorm2d(C, num_classes=20, dtype=x.dtype)(x, INDEX),
    "rows of samples": lambda x: nn.ConditionalBatchNorm2d(C, dtype=x.dtype)(
        x, weight=x[:, :, 0, 0], bias=x[:, :, 1, 1]
    ),
}


def step(call: Callable[[Tensor], Tensor], dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, dy = (
        torch.randn(N, C, 4, 7, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    y = call(x.requires_grad_())
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_both_halves_at_once_agree_with_one_after_the_other(
    name: str, layout: torch.memory_format, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [(routes, "batch_moments"), (parts, "_normalize"), (parts, "_backward_reduce")]
    if node == NODES["native"]:
        others.append((routes, "_apply_parts"))
    with monkeypatch.context() as patch:
        for module, function in others:
            patch.setattr(module, function, refuse)
        found = step(CALLS[name], torch.float64, layout)
        single = step(CALLS[name], torch.float32, layout)
    monkeypatch.setattr(strict, "takes_parts", lambda *tensors: False)
    expected = step(CALLS[name], torch.float64, layout)
    for ours, narrow, theirs in zip(found, single, expected, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(narrow.double(), theirs, rtol=2e-5, atol=2e-5)


def test_a_mask_gives_the_bits_of_the_two_halves_also_if_rows_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of backward combine rows of 40 channels; weights need them one by one."""
    x, dy = (torch.randn(6, 40, 9, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    mask = torch.rand(6, 9, 5)
    results = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(strict, "takes_parts", lambda *tensors: False)
        inputs = [t.requires_grad_() for t in (x.detach(), torch.linspace(-1, 1, 40), torch.linspace(0, 1, 40))]
        y = batch_norm(inputs[0], None, None, *inputs[1:], training=True, mask=mask, activation="relu")  # type: ignore[misc]
        results.append((y.detach(), *torch.autograd.grad(y, inputs, dy)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 3e38])
def test_the_ordinary_route_clears_padding_that_is_not_finite(padding: float) -> None:
    expected = step(mask_with(0.0), torch.float32, torch.contiguous_format)
    y, dx = step(mask_with(padding), torch.float32, torch.contiguous_format)
    counted = torch.arange(y[:, 0].numel()).reshape(N, 1, 4, 7).expand(y.shape) % 3 != 0
    torch.testing.assert_close(y[counted], expected[0][counted], rtol=1e-6, atol=1e-6)
    assert dx.isfinite().all() or padding == 3e38


EMPTY = torch.arange(N)[:, None, None] % 2 != 0  # no position counts in the groups of samples 0, 2 and 4
WITHOUT_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda x: batch_norm(x, None, None, training=True, mask=EMPTY & ~EMPTY),
    "ghost": lambda x: nn.GhostBatchNorm2d(C, ghost_size=1)(x, EMPTY),
    "domain": lambda x: nn.DomainBatchNorm2d(C, num_domains=3)(x, torch.arange(N) % 2, mask=EMPTY),
    "conditional": lambda x: nn.ConditionalBatchNorm2d(C, num_classes=3)(x, INDEX, mask=EMPTY & ~EMPTY),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_padding_that_is_not_finite_is_zero_in_a_group_without_values(
    name: str, padding: float, layout: torch.memory_format
) -> None:
    def padded(value: float) -> Callable[[Tensor], Tensor]:
        return lambda x: WITHOUT_VALUES[name](torch.where(EMPTY.unsqueeze(1) | (x > 0.0), x, value))

    results = (step(padded(value), torch.float32, layout) for value in (padding, 0.0))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_residual_and_activation_take_part() -> None:
    x, residual = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    full = torch.ones(2, 4, 5, dtype=torch.bool)
    dy, results = torch.randn(2, 3, 4, 5), []
    for mask in (None, full):
        y = batch_norm(x, None, None, training=True, activation="relu", residual=residual, mask=mask)
        results.append([y, *torch.autograd.grad(y, (x, residual), dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- the node ---------------------------------------------------------------------------------------------------


def test_higher_derivatives_are_those_of_the_operations(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    def second(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        x, dy, v = (torch.randn(N, C, 4, 7, generator=generator, dtype=torch.float64) for _ in range(3))
        x.requires_grad_(), dy.requires_grad_()
        (dx,) = torch.autograd.grad(call(x), x, dy, create_graph=True)
        return [*torch.autograd.grad(dx, (x, dy), v)]

    names = [name for name in CALLS if name != "rows of samples"]
    found = [second(CALLS[name]) for name in names]
    monkeypatch.setattr(strict, "takes_parts", lambda *tensors: False)
    for name, ours in zip(names, found, strict=True):
        for first, expected in zip(ours, second(CALLS[name]), strict=True):
            torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_several_upstreams_at_once_are_those_of_each(node: str) -> None:
    x, dys = torch.randn(N, C, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, N, C, 4, 7).double()
    y = CALLS["domain and mask"](x)
    assert y.grad_fn is not None
    assert node in y.grad_fn.name()
    expected = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(y, x, dys, True, create_graph, is_grads_batched=True)
        torch.testing.assert_close(found, expected)


def test_running_statistics_are_those_of_the_ordinary_route_and_count_one_version(
    monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    def update(kind: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(N, C, 4, 7, generator=generator)
        mask = torch.rand(N, 4, 7, generator=generator)
        layer: Any = {
            "mask": lambda: nn.BatchNorm2d(C),
            "ghost": lambda: nn.GhostBatchNorm2d(C, ghost_size=4, momentum=None),
            "domain": lambda: nn.DomainBatchNorm2d(C, num_domains=4),
            "conditional": lambda: nn.ConditionalBatchNorm2d(C, num_classes=3),
        }[kind]()
        arguments = (INDEX,) if kind in ("domain", "conditional") else ()
        before = [t._version for t in layer.buffers()]
        for gradient in (False, True):
            layer(x.requires_grad_(gradient), *arguments, mask=mask)
        layer.update_running_stats = False
        layer(x, *arguments, mask=mask)
        assert all(t._version > version for t, version in zip(layer.buffers(), before, strict=True))
        return list(layer.buffers())

    kinds = ("mask", "ghost", "domain", "conditional")
    found = [update(kind) for kind in kinds]
    monkeypatch.setattr(strict, "takes_parts", lambda *tensors: False)
    for ours, kind in zip(found, kinds, strict=True):
        for buffer, expected in zip(ours, update(kind), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-6)


def test_a_tensor_that_changes_before_backward_is_an_error(node: str) -> None:
    x, index = torch.randn(N, C, 4, 7, requires_grad=True), INDEX.clone()
    mask = torch.rand(N, 4, 7)
    layer = nn.ConditionalBatchNorm2d(C, num_classes=3)
    for changed in (layer.weight, index, mask):
        y = layer(x, index, mask=mask)
        with torch.no_grad():
            changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_only_the_gradients_that_are_needed_are_computed(node: str) -> None:
    x, mask = torch.randn(N, C, 4, 7, dtype=torch.float64), torch.rand(N, 4, 7)
    residual = torch.randn_like(x)
    weight, bias = torch.rand(C, dtype=torch.float64), torch.rand(C, dtype=torch.float64)
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual}

    def gradients(needed: tuple[str, ...], activation: str) -> list[Tensor]:
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in tensors.items()}
        y = batch_norm(
            leaves["x"], None, None, leaves["weight"], leaves["bias"], True, mask=mask, residual=leaves["residual"],
            activation=activation,
        )  # fmt: skip
        y.sin().sum().backward()
        assert all((t.grad is None) == (name not in needed) for name, t in leaves.items())
        return [leaves[name].grad for name in needed]  # type: ignore[misc]

    for activation in ("none", "silu"):
        every = dict(zip(tensors, gradients(tuple(tensors), activation), strict=True))
        for needed in (("x",), ("weight",), ("bias", "residual"), ("residual",)):
            for name, found in zip(needed, gradients(needed, activation), strict=True):
                torch.testing.assert_close(found, every[name], rtol=1e-12, atol=1e-12)
