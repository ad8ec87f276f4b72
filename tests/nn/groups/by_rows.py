"""Helpers of the tests of layers with rows of `[K, C]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm import reference
from tests.cases import Case
from tests.tolerance import Array, Terms, assert_within, bound


def wide(t: Tensor | None) -> Array | None:
    return None if t is None else t.detach().double().numpy()


def randomized(layer: nn.Module) -> Any:
    """Return the layer with parameters and buffers that differ from their initial values and between rows."""
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
            else:
                tensor.copy_(torch.arange(3, 3 + tensor.numel()).view_as(tensor))
    return layer


def assert_agrees_with_the_reference(
    case: Case,
    layer: nn.Module,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    call: Callable[[Tensor], Tensor],
    groups: int | None = None,
) -> None:
    """Return y and every gradient of `call(x)` in training, by the operators and by `torch.func`."""
    x, dy = case.x(), case.random(4)
    parameters = [t for t in (weight, bias) if t is not None]
    options = {"index": index.numpy(), "groups": groups, "eps": layer.eps}
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    forward = reference.forward_training(wide(x), wide(weight), wide(bias), **options)
    terms, gradients = Terms(forward, None, wide(bias)), reference.backward(wide(dy), forward)
    dz = terms.dz(wide(dy), smooth=False)
    sum_dz, sum_dz_xhat = terms.sums(dz, like=forward.weight)

    def by_autograd(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf)
        return y, *torch.autograd.grad(y, (leaf, *parameters), dy)

    def by_transforms() -> tuple[Tensor, ...]:
        names = [name for name, t in layer.named_parameters() if any(t is p for p in parameters)]

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(wrapped, {f"layer.{n}": v for n, v in zip(names, values, strict=True)}, x)

        wrapped = _Wrapped(layer, call)
        y, pull = torch.func.vjp(function, x, *(dict(layer.named_parameters())[n].detach() for n in names))
        return y, *pull(dy)

    results = {"operators": by_autograd(call)}
    if case.dtype in (torch.float32, torch.float64):  # torch adds up the parts of a half dx in halves
        results["func"] = by_transforms()
    for route, (y, dx, *found) in results.items():
        allowed = bound(terms.z, case.dtype, forward.y)
        assert_within(y, forward.y, allowed, f"{route}: y")
        assert y.dtype == case.dtype
        assert_within(dx, gradients.dx, bound(terms.dx(dz), case.dtype, gradients.dx), f"{route}: dx")
        remaining = iter(found)
        if weight is not None:
            assert_within(next(remaining), gradients.dweight, bound(sum_dz_xhat, case.dtype), f"{route}: dweight")
        if bias is not None:
            assert_within(next(remaining), gradients.dbias, bound(sum_dz, case.dtype), f"{route}: dbias")
        assert next(remaining, None) is None
    assert np.isfinite(forward.y).all()


def step_results(layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return y, every gradient, and the buffers after a step."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = call(layer, leaf)
    y.pow(2).mul(torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters()), *(t.clone() for t in layer.buffers())]


class _Wrapped(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)
