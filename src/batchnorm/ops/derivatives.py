"""Derivatives of the operators: `autograd.Function`s for eager mode, and the same registered for compilation.

Kept for backward: x, vectors, and at most one more tensor, y or the residual, where there is a residual and f′(z)
cannot be had without. The second derivative differentiates the plain torch operations of `eager`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import eager
from batchnorm.ops.activations import ACTIVATIONS, known_from_output

_train_forward = torch.ops.batchnorm.train_forward.default
_train_backward = torch.ops.batchnorm.train_backward.default
_normalize = torch.ops.batchnorm.normalize.default
_normalize_backward = torch.ops.batchnorm.normalize_backward.default
_backward_reduce = torch.ops.batchnorm.backward_reduce.default

# Inside a Function the operators' own registered derivative has nothing to do but cost time.
below_autograd = torch._C._AutoDispatchBelowAutograd

# dx, dγ, dβ and dr of one call, None where not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def keep_for_activation(
    residual: Tensor | None, y: Tensor, activation: str, negative_slope: float
) -> tuple[Tensor | None, Tensor | None]:
    """`(residual, y)` with at most one of them: what f′(z) cannot be had without."""
    if residual is None or activation == "none":
        return None, None
    return (None, y) if known_from_output(activation, negative_slope) else (residual, None)


def like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A per-row sum as the gradient of a parameter of `[C]` or `[K, C]`, in its dtype."""
    if parameter is None:
        return None
    if gradient.dim() > parameter.dim():
        gradient = gradient.sum(0)
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def differentiable_gradients(
    dy: Tensor,
    kept: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    attributes: tuple[float, str, float],
    statistics: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    index: Tensor | None = None,
) -> Gradients:
    """The gradients as functions of dy and of what was kept, to be differentiated again.

    `statistics` computes mean, mean_low and var from x; without it they are held.
    """
    x, residual, y, mean, mean_low, var, weight, bias = kept
    assert x is not None
    assert mean is not None
    assert var is not None
    eps, activation, negative_slope = attributes
    # Views, so that the first derivative stops here even where two arguments are one tensor.
    x, weight, bias = (None if t is None else t.view_as(t) for t in (x, weight, bias))
    assert x is not None
    if statistics is not None:
        mean, mean_low, var = statistics(x)
    z = eager.preactivation(x, mean, mean_low, var, weight, bias, None, index, eps)
    upstream = dy.to(z.dtype)
    if y is not None:  # f′ is constant between its kinks: y's own derivative adds nothing
        dz = ACTIVATIONS[activation].backward(upstream, y.detach().to(z.dtype), negative_slope)
    else:  # torch's formulas of f′ have no derivative of their own; its f has
        t = z if residual is None else z + residual.to(z.dtype)
        (dz,) = torch.autograd.grad(ACTIVATIONS[activation].forward(t, negative_slope), t, upstream, create_graph=True)
    wanted = [t for t, need in zip((x, weight, bias), needs, strict=False) if need and t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True) if wanted else ())
    dx, dweight, dbias = (
        next(found) if need and t is not None else None for t, need in zip((x, weight, bias), needs, strict=False)
    )
    return dx, dweight, dbias, dz.to(x.dtype) if needs[3] else None


# Batch statistics: train_forward(x, weight, bias, residual, eps, activation, negative_slope)


def train_gradients(
    dy: Tensor, kept: tuple[Tensor | None, ...], needs: tuple[bool, ...], attributes: tuple[float, str, float]
) -> Gradients:
    """The gradients of `train_forward`, by the operators."""
    weight, bias = kept[6:]
    needs_x, needs_weight, needs_bias, needs_residual = needs
    need_dz = needs_residual and attributes[1] != "none"
    dx = dz = None
    if needs_x or need_dz:
        dx, dweight, dbias, dz = _train_backward(dy, *kept, *attributes, need_dz)
    else:
        dbias, dweight = _backward_reduce(dy, *kept, None, 1, *attributes)
    return (
        dx if needs_x else None,
        like(dweight, weight) if needs_weight else None,
        like(dbias, bias) if needs_bias else None,
        (dz if need_dz else dy) if needs_residual else None,
    )


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, *attributes = inputs
    y, mean, mean_low, var = output
    kept = keep_for_activation(residual, y, *attributes[1:])
    ctx.save_for_backward(x, *kept, mean, mean_low, var, weight, bias)
    ctx.attributes = tuple(attributes)
    ctx.mark_non_differentiable(mean, mean_low, var)
    ctx.set_materialize_grads(False)


def _registered_backward_train(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    return *train_gradients(dy, ctx.saved_tensors, ctx.needs_input_grad[:4], ctx.attributes), None, None, None


class TrainFunction(torch.autograd.Function):
    """y of `train_forward` under autograd; mean, mean_low and var are appended to the list `statistics`.

    They are not results, so that autograd has one to look after: it is the larger part of a small layer's time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        attributes: tuple[float, str, float],
        statistics: list[Tensor],
    ) -> Tensor:
        """Compute y, and keep what backward needs."""
        with below_autograd():
            y, mean, mean_low, var = _train_forward(x, weight, bias, residual, *attributes)
        statistics += (mean, mean_low, var)
        kept = keep_for_activation(residual, y, attributes[1], attributes[2])
        ctx.save_for_backward(x, *kept, mean, mean_low, var, weight, bias)
        ctx.attributes = attributes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """First derivative by the operators, higher ones through plain torch operations."""
        if dy is None:
            return (None,) * 6
        kept, needs = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(dy, kept, needs, ctx.attributes, eager.batch_statistics)
        else:
            with below_autograd():
                gradients = train_gradients(dy, kept, needs, ctx.attributes)
        return *gradients, None, None


# Given statistics: normalize(x, mean, mean_low, var, weight, bias, residual, index, eps, activation, negative_slope)


def _normalize_gradients(
    dy: Tensor,
    kept: tuple[Tensor | None, ...],
    index: Tensor | None,
    needs: tuple[bool, ...],
    attributes: tuple[float, str, float],
) -> tuple[Gradients, Tensor, Tensor]:
    """dx, dγ, dβ, dr; and the sums Σ dz·x̂ and Σ dz."""
    mean, weight, bias = kept[3], *kept[6:]
    needs_x, needs_weight, needs_bias, needs_residual = needs
    need_dz = needs_residual and attributes[1] != "none"
    rows = next((t.shape[0] for t in (mean, weight, bias) if t is not None and t.dim() == 2), 1)
    dx = dz = None
    if needs_x or need_dz:
        dx, sum_dz_xhat, sum_dz, dz = _normalize_backward(dy, *kept, index, rows, *attributes, need_dz)
    else:
        sum_dz, sum_dz_xhat = _backward_reduce(dy, *kept, index, rows, *attributes)
    gradients = (
        dx if needs_x else None,
        like(sum_dz_xhat, weight) if needs_weight else None,
        like(sum_dz, bias) if needs_bias else None,
        (dz if need_dz else dy) if needs_residual else None,
    )
    return gradients, sum_dz_xhat, sum_dz


def _setup_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, mean_low, var, weight, bias, residual, index, *attributes = inputs
    kept = keep_for_activation(residual, output, *attributes[1:])
    ctx.save_for_backward(x, *kept, mean, mean_low, var, weight, bias, index)
    ctx.attributes = tuple(attributes)
    ctx.set_materialize_grads(False)


def _registered_backward_normalize(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    *kept, index = ctx.saved_tensors
    mean, _, var, weight = kept[3:7]
    needs_x, needs_mean, needs_low, needs_var, *needs = ctx.needs_input_grad[:7]
    gradients, sum_dz_xhat, sum_dz = _normalize_gradients(dy, tuple(kept), index, (needs_x, *needs), ctx.attributes)
    dmean = dlow = dvar = None
    if needs_mean or needs_low or needs_var:
        invstd = (var + ctx.attributes[0]).rsqrt()
        scale = invstd if weight is None else invstd * weight
        shift = like(-scale * sum_dz, mean)
        dmean, dlow = shift if needs_mean else None, shift if needs_low else None
        dvar = like(-0.5 * scale * invstd * sum_dz_xhat, var) if needs_var else None
    dx, dweight, dbias, dresidual = gradients
    return dx, dmean, dlow, dvar, dweight, dbias, dresidual, None, None, None, None


class NormalizeFunction(torch.autograd.Function):
    """y of `normalize` under autograd, its statistics held constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        index: Tensor | None,
        attributes: tuple[float, str, float],
    ) -> Tensor:
        """Compute y, and keep what backward needs."""
        with below_autograd():
            y: Tensor = _normalize(x, mean, None, var, weight, bias, residual, index, *attributes)
        kept = keep_for_activation(residual, y, attributes[1], attributes[2])
        ctx.save_for_backward(x, *kept, mean, None, var, weight, bias, index)
        ctx.attributes = attributes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """First derivative by the operators, higher ones through plain torch operations."""
        if dy is None:
            return (None,) * 8
        *kept, index = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(dy, tuple(kept), needs, ctx.attributes, index=index)
        else:
            with below_autograd():
                gradients, _, _ = _normalize_gradients(dy, tuple(kept), index, needs, ctx.attributes)
        return *gradients, None, None, None, None


def _setup_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, index, weights, _ = inputs
    count, mean, mean_low, _ = output
    ctx.save_for_backward(x, index, weights, count, mean, mean_low)
    ctx.mark_non_differentiable(count, mean)
    ctx.set_materialize_grads(False)


def _registered_backward_moments(
    ctx: Any, dcount: None, dmean: None, dmean_low: Tensor | None, dm2: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dmean_low is None and dm2 is None:
        return (None,) * 4
    x, index, weights, count, mean, mean_low = ctx.saved_tensors
    dx = eager.moments_backward(x, index, weights, count, mean, mean_low, dmean_low, dm2)
    return dx, None, None, None


def _refuse(name: str) -> Any:
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"batchnorm::{name} is itself a derivative and has none. For second derivatives call the layer or "
            "batchnorm.functional.batch_norm outside torch.compile."
        )

    return backward


torch.library.register_autograd("batchnorm::train_forward", _registered_backward_train, setup_context=_setup_train)
torch.library.register_autograd("batchnorm::normalize", _registered_backward_normalize, setup_context=_setup_normalize)
torch.library.register_autograd("batchnorm::moments", _registered_backward_moments, setup_context=_setup_moments)
for _name in ("train_backward", "normalize_backward", "backward_reduce", "backward_apply"):
    torch.library.register_autograd(f"batchnorm::{_name}", _refuse(_name))
