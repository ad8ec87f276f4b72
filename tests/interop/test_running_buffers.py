"""Writes to running buffers between forward and backward (as in a GAN) raise no error and change no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

BACKENDS = pytest.mark.parametrize("backend", [None, "aot_eager", "aot_eager_decomp_partition", "inductor"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def compiled(layer: nn.Module, backend: str | None) -> Callable[..., Tensor]:
    return layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)


def layer_and_copy(dtype: torch.dtype, training: bool) -> tuple[nn.Module, nn.Module]:
    layer = bn.BatchNormAct2d(3, activation="silu", dtype=dtype)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0)
    layer.train(training)
    return layer, copy.deepcopy(layer)


@TRAINING
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_writing_to_the_buffers_changes_no_gradient(backend: str | None, training: bool, dtype: torch.dtype) -> None:
    layer, untouched = layer_and_copy(dtype, training)
    call = compiled(layer, backend)
    x, again = (torch.randn(4, 3, 5, 5, dtype=dtype).requires_grad_() for _ in range(2))
    again = x.detach().clone().requires_grad_()
    dy = torch.randn(4, 3, 5, 5, dtype=dtype)
    untouched(again).backward(dy)
    y = call(x)
    with torch.no_grad():
        layer.running_mean.fill_(100.0)
        layer.running_var.fill_(50.0)
        layer.num_batches_tracked.fill_(7)
    y.backward(dy)
    assert_close(x.grad, again.grad)
    for parameter, its in zip(layer.parameters(), untouched.parameters(), strict=True):
        assert_close(parameter.grad, its.grad)


@BACKENDS
@pytest.mark.parametrize("second_in_training", [True, False])
def test_two_forwards_before_one_backward(backend: str | None, second_in_training: bool) -> None:
    layer, untouched = layer_and_copy(torch.float64, not second_in_training)
    call = compiled(layer, backend)
    first, second, dy = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)

    expected = []
    for x, training in ((first, not second_in_training), (second, second_in_training)):
        untouched.train(training)
        expected.append(torch.autograd.grad(untouched(x), tuple(untouched.parameters()), dy))
    total = [sum(pair) for pair in zip(*expected, strict=True)]

    outputs = []
    for x, training in ((first, not second_in_training), (second, second_in_training)):
        layer.train(training)
        outputs.append(call(x))
    torch.autograd.backward(outputs, [dy, dy])
    for parameter, its in zip(layer.parameters(), total, strict=True):
        assert_close(parameter.grad, its, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 1


@TRAINING
def test_writing_to_the_buffers_changes_no_second_derivative(training: bool) -> None:
    def second(write: bool) -> Tensor:
        torch.manual_seed(0)
        layer, _ = layer_and_copy(torch.float64, training)
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        if write:
            layer.running_var.fill_(50.0)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if write:
            layer.running_mean.fill_(50.0)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    assert torch.equal(second(True), second(False))


def test_a_gan_trains_with_one_discriminator_and_two_forwards() -> None:
    generator = nn.Sequential(nn.Linear(2, 8), bn.BatchNormAct1d(8), nn.Linear(8, 4))
    discriminator = nn.Sequential(nn.Linear(4, 8), bn.BatchNormAct1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD([*generator.parameters(), *discriminator.parameters()], lr=0.01)
    for _ in range(3):
        real, fake = discriminator(torch.randn(16, 4)), discriminator(generator(torch.randn(16, 2)))
        optimizer.zero_grad()
        (fake.mean() - real.mean()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
        optimizer.step()
    assert discriminator[1].num_batches_tracked == 6
    assert generator[1].num_batches_tracked == 3
