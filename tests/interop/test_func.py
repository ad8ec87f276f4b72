"""`torch.func` and forward mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.testing import assert_close

import batchnorm as bn
from tests.cases import ACTIVATIONS

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ADVICE = r"running statistics can be updated only if .* Pass the buffers as arguments .* or use track_running_stats"


def layer_in(training: bool, activation: str = "silu", **options: Any) -> bn.BatchNormAct2d:
    layer = bn.BatchNormAct2d(2, activation=activation, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(3)
    layer.train(training)
    return layer


def differentiable(training: bool, activation: str = "silu") -> Callable[[Tensor], Tensor]:
    """Return a scalar function of a layer whose running statistics do not change."""
    layer = layer_in(training, activation)
    layer.update_running_stats = False
    return lambda x: layer(x, x.sin()).square().mean()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@TRAINING
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_derivatives_agree_over_transforms(activation: str, training: bool) -> None:
    function, x, v = differentiable(training, activation), x_of(3, 2, 2, 2), x_of(3, 2, 2, 2)
    expected = by_autograd(function, x)
    close = {"rtol": 1e-10, "atol": 1e-12}
    assert_close(grad(function)(x), expected, **close)
    assert_close(grad_and_value(function)(x)[1], function(x), **close)
    assert_close(jacrev(function)(x), expected, **close)
    assert_close(jacfwd(function)(x), expected, **close)
    assert_close(vjp(function, x)[1](torch.ones((), dtype=x.dtype))[0], expected, **close)
    along = (expected * v).sum()
    assert_close(jvp(function, (x,), (v,))[1], along, **close)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent, along, **close)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch, of its own graph
@TRAINING
def test_linearize(training: bool) -> None:
    function, x, v = differentiable(training), x_of(3, 2, 2, 2), x_of(3, 2, 2, 2)
    assert_close(linearize(function, x)[1](v), jvp(function, (x,), (v,))[1])


@TRAINING
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_second_derivatives_agree_over_transforms(activation: str, training: bool) -> None:
    function, x = differentiable(training, activation), x_of(2, 2, 2, 1)
    expected = torch.autograd.functional.hessian(function, x)
    for second in (hessian(function), jacrev(jacrev(function)), jacfwd(jacfwd(function)), jacrev(jacfwd(function))):
        assert_close(second(x), expected, rtol=1e-9, atol=1e-11)


@TRAINING
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_forward_over_reverse(activation: str, training: bool) -> None:
    function, x, v = differentiable(training, activation), x_of(2, 2, 2, 2), x_of(2, 2, 2, 2)
    expected = (torch.autograd.functional.hessian(function, x).flatten(4).flatten(0, 3) @ v.flatten()).view_as(x)
    assert_close(jvp(grad(function), (x,), (v,))[1], expected, rtol=1e-9, atol=1e-11)
    if activation == "none":  # torch's silu_backward has no forward mode outside torch.func
        with forward_ad.dual_level():
            leaf = forward_ad.make_dual(x.clone().requires_grad_(), v)
            (dx,) = torch.autograd.grad(function(leaf), leaf)
            assert_close(forward_ad.unpack_dual(dx).tangent, expected, rtol=1e-9, atol=1e-11)


def test_dual_numbers_update_running_statistics_without_tangents() -> None:
    layer, x = layer_in(True), x_of(3, 2, 2, 2)
    other = copy.deepcopy(layer)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x.cos()))
        assert forward_ad.unpack_dual(layer.running_mean).tangent is None
    other(x)
    assert_close(layer.state_dict(), other.state_dict(), rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 4


@TRAINING
def test_vmap_is_a_loop(training: bool) -> None:
    layer, x = layer_in(training), x_of(3, 4, 2, 2, 2)
    layer.update_running_stats = False
    assert_close(vmap(layer)(x), torch.stack([layer(t) for t in x]))
    assert_close(vmap(layer, in_dims=1)(x.transpose(0, 1)), torch.stack([layer(t) for t in x]))
    assert_close(vmap(vmap(layer))(x[None]), torch.stack([layer(t) for t in x])[None])


def test_per_sample_gradients_in_evaluation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer_in(False), nn.Flatten(), nn.Linear(8, 1)).double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x = x_of(5, 1, 4, 4)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for number, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for key, parameter in model.named_parameters():
            assert_close(found[key][number], parameter.grad)


def test_functional_call_reads_and_updates_the_buffers_it_is_given() -> None:
    layer, x = layer_in(True), x_of(4, 2, 3, 3)
    other = copy.deepcopy(layer)
    given = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    y = functional_call(layer, given, (x,))
    assert layer.num_batches_tracked == 3
    assert_close(y, other(x), rtol=0, atol=0)
    assert_close(given, dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_buffers_made_inside_the_transformed_function_are_updated(momentum: float | None) -> None:
    layer, x = layer_in(True, momentum=momentum), x_of(4, 2, 3, 3)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    held = {k: v.clone() for k, v in layer.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {k: v.clone() for k, v in buffers.items()}
        return functional_call(layer, (parameters, buffers), (x,)).square().sum(), buffers

    found, moved = grad(loss, has_aux=True)(parameters, held)
    layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert_close(found[key], parameter.grad)
    assert_close(moved, dict(layer.named_buffers()), rtol=1e-12, atol=1e-12)


def test_an_ensemble_of_models_trains_under_vmap() -> None:
    models = [layer_in(True) for _ in range(3)]
    for number, model in enumerate(models):
        nn.init.constant_(model.weight, number + 1.0)
    parameters, buffers = stack_module_state(models)
    x, skeleton = x_of(4, 2, 3, 3), copy.deepcopy(models[0]).to("meta")

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,))

    y = vmap(call)(parameters, buffers)
    for number, model in enumerate(models):
        assert_close(y[number], model(x))
        for key, buffer in model.named_buffers():
            assert_close(buffers[key][number], buffer)


def capturing(transform: str, layer: nn.Module, x: Tensor) -> Any:
    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    if transform == "vmap":
        return vmap(layer)(torch.stack([x, x]))
    if transform == "jvp":
        return jvp(loss, (x,), (x,))
    return {"grad": grad, "jacrev": jacrev, "jacfwd": jacfwd, "hessian": hessian}[transform](loss)(x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jacfwd", "hessian", "jvp"])
def test_captured_buffers_raise_an_error_with_advice_and_do_not_change(transform: str, momentum: float | None) -> None:
    layer, x = layer_in(True, momentum=momentum), x_of(3, 2, 2, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=ADVICE):
        capturing(transform, layer, x)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["track_running_stats=False", "update_running_stats=False", ".eval()"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jacfwd", "hessian", "jvp"])
def test_the_advice_works(transform: str, way: str) -> None:
    layer = layer_in(True, track_running_stats=way != "track_running_stats=False")
    if way == "update_running_stats=False":
        bn.update_running_stats(layer, False)
    elif way == ".eval()":
        layer.eval()
    capturing(transform, layer, x_of(3, 2, 2, 2))
