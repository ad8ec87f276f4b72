"""Derivatives of the operators: `autograd.Function`s for eager mode, and the same registered for compilation.

Forward keeps x and vectors for backward. With a residual, it also keeps y or the residual, depending on which of them
determines f′(z). The second derivative differentiates the plain torch operations of `eager`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import direct, eager
from batchnorm.ops.activations import ACTIVATIONS, known_from_output
from batchnorm.ops.schemas import Attributes, Kept, Vectors

train_forward = direct.operator("train_forward", 4)
normalize = direct.operator("normalize", 8)
_train_backward = direct.operator("train_backward", 9)
_normalize_backward = direct.operator("normalize_backward", 10)
_backward_reduce = direct.operator("backward_reduce", 10)

# `named(Kept, tensors)` creates a NamedTuple in half the time of `Kept(*tensors)`. This saves 1 µs in a tiny layer's
# training step of about 50 µs.
named = tuple.__new__

# Inside a Function, the operators' registered derivatives are not needed and would cost time.
below_autograd = torch._C._AutoDispatchBelowAutograd

# dx, dγ, dβ and dr of one call; None if not needed.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records an operation on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator for `any` would take longer than this
            if t is not None and t.requires_grad:
                return True
    return False


def kept_for_activation(
    residual: Tensor | None, y: Tensor, attributes: Attributes
) -> tuple[Tensor | None, Tensor | None]:
    """Return residual and y, but None for those that do not determine f′(z)."""
    _, activation, parameter = attributes
    if residual is None or activation == "none":
        return None, None
    return (None, y) if known_from_output(activation, parameter) else (residual, None)


def keep(
    ctx: Any,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    vectors: tuple[Tensor | None, ...],
    attributes: Attributes,
    *others: Tensor | None,
) -> None:
    """Save a `Kept` and `others` for backward."""
    ctx.save_for_backward(x, *kept_for_activation(residual, y, attributes), *vectors, *others)
    ctx.attributes = attributes
    ctx.set_materialize_grads(False)


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Convert a per-row sum to the gradient of a `[C]` or `[K, C]` parameter, in its dtype."""
    if parameter is None:
        return None
    if gradient.dim() > parameter.dim():
        gradient = gradient.sum(0)
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def needed_gradients(
    needs: tuple[bool, ...],
    kept: Kept,
    attributes: Attributes,
    dy: Tensor,
    dx: Tensor | None,
    sum_dz_xhat: Tensor,
    sum_dz: Tensor,
    dz: Tensor | None,
) -> Gradients:
    """Return dx, dγ, dβ and dr, with None for gradients that are not needed; without an activation, dz is dy."""
    needs_x, needs_weight, needs_bias, needs_residual = needs
    return (
        dx if needs_x else None,
        _like(sum_dz_xhat, kept.weight) if needs_weight else None,
        _like(sum_dz, kept.bias) if needs_bias else None,
        (dy if attributes.activation == "none" else dz) if needs_residual else None,
    )


def differentiable_gradients(
    dy: Tensor,
    kept: Kept,
    needs: tuple[bool, ...],
    attributes: Attributes,
    statistics: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    index: Tensor | None = None,
) -> Gradients:
    """Return the gradients as differentiable functions of dy and of the kept tensors.

    `statistics` computes mean, mean_low and var from x. Without it, they are constants.
    """
    eps, activation, negative_slope = attributes
    # Views, so that the first derivative stops here even if two arguments are the same tensor.
    x, weight, bias = (None if t is None else t.view_as(t) for t in (kept.x, kept.weight, kept.bias))
    assert x is not None
    mean, mean_low, var = kept.vectors[:3] if statistics is None else statistics(x)
    z = eager.preactivation(x, Vectors(mean, mean_low, var, weight, bias), None, index, eps)
    upstream = dy.to(z.dtype)
    if kept.y is not None:  # f′ is constant between its kinks, so y's derivative adds nothing
        dz = ACTIVATIONS[activation].backward(upstream, kept.y.detach().to(z.dtype), negative_slope)
    else:  # torch can differentiate f twice, but cannot differentiate its formulas for f′
        t = z if kept.residual is None else z + kept.residual.to(z.dtype)
        (dz,) = torch.autograd.grad(ACTIVATIONS[activation].forward(t, negative_slope), t, upstream, create_graph=True)
    wanted = [t for t, need in zip((x, weight, bias), needs, strict=False) if need and t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True) if wanted else ())
    dx, dweight, dbias = (
        next(found) if need and t is not None else None for t, need in zip((x, weight, bias), needs, strict=False)
    )
    return dx, dweight, dbias, dz.to(x.dtype) if needs[3] else None


# Batch statistics: train_forward(x, weight, bias, residual, eps, activation, negative_slope)


def train_gradients(dy: Tensor, kept: Kept, needs: tuple[bool, ...], attributes: Attributes) -> Gradients:
    """Return the gradients of `train_forward`, by the operators."""
    need_dz = needs[3] and attributes.activation != "none"
    dx = dz = None
    if needs[0] or need_dz:
        dx, dweight, dbias, dz = _train_backward(dy, *kept, *attributes, need_dz)
    else:
        dbias, dweight = _backward_reduce(dy, *kept, None, 1, *attributes)
    return needed_gradients(needs, kept, attributes, dy, dx, dweight, dbias, dz)


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, *attributes = inputs
    y, *statistics = output
    keep(ctx, x, residual, y, (*statistics, weight, bias), Attributes(*attributes))
    ctx.mark_non_differentiable(*statistics)


def _registered_backward_train(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    gradients = train_gradients(dy, Kept(*ctx.saved_tensors), ctx.needs_input_grad[:4], ctx.attributes)
    return *gradients, None, None, None


class TrainFunction(torch.autograd.Function):
    """y of `train_forward` under autograd; mean, mean_low and var are appended to the list `statistics`.

    They are not results, because tracking more than one result would take most of a small layer's time. `update` holds
    the running statistics and the momentum, if `direct.train_forward_and_update_` can also update them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        attributes: Attributes,
        statistics: list[Tensor],
        update: tuple[Any, ...] | None,
    ) -> Tensor:
        """Compute y, and save tensors for backward."""
        with below_autograd():
            if update is None:
                y, mean, mean_low, var = train_forward(x, weight, bias, residual, *attributes)
            else:
                y, mean, mean_low, var = direct.train_forward_and_update_(
                    x, weight, bias, residual, *attributes, *update
                )
        statistics += (mean, mean_low, var)
        keep(ctx, x, residual, y, (mean, mean_low, var, weight, bias), attributes)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by the operators, higher ones through plain torch operations."""
        if dy is None:
            return (None,) * 7
        kept, needs = named(Kept, ctx.saved_tensors), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(dy, kept, needs, ctx.attributes, eager.batch_statistics)
        else:
            with below_autograd():
                gradients = train_gradients(dy, kept, needs, ctx.attributes)
        return *gradients, None, None, None


# Given statistics: normalize(x, mean, mean_low, var, weight, bias, residual, index, eps, activation, negative_slope)


def normalize_gradients(
    dy: Tensor, kept: Kept, index: Tensor | None, needs: tuple[bool, ...], attributes: Attributes
) -> tuple[Gradients, Tensor, Tensor]:
    """Return dx, dγ, dβ and dr, and the sums Σ dz·x̂ and Σ dz."""
    need_dz = needs[3] and attributes.activation != "none"
    rows = next((t.shape[0] for t in (kept.mean, kept.weight, kept.bias) if t is not None and t.dim() == 2), 1)
    dx = dz = None
    if needs[0] or need_dz:
        dx, sum_dz_xhat, sum_dz, dz = _normalize_backward(dy, *kept, index, rows, *attributes, need_dz)
    else:
        sum_dz, sum_dz_xhat = _backward_reduce(dy, *kept, index, rows, *attributes)
    return needed_gradients(needs, kept, attributes, dy, dx, sum_dz_xhat, sum_dz, dz), sum_dz_xhat, sum_dz


def _setup_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, mean_low, var, weight, bias, residual, index, *attributes = inputs
    keep(ctx, x, residual, output, (mean, mean_low, var, weight, bias), Attributes(*attributes), index)


def _registered_backward_normalize(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    *tensors, index = ctx.saved_tensors
    kept = Kept(*tensors)
    needs_x, needs_mean, needs_low, needs_var, *needs = ctx.needs_input_grad[:7]
    gradients, sum_dz_xhat, sum_dz = normalize_gradients(dy, kept, index, (needs_x, *needs), ctx.attributes)
    dmean = dlow = dvar = None
    if needs_mean or needs_low or needs_var:
        invstd = (kept.var + ctx.attributes.eps).rsqrt()
        scale = invstd if kept.weight is None else invstd * kept.weight
        shift = _like(-scale * sum_dz, kept.mean)
        dmean, dlow = shift if needs_mean else None, shift if needs_low else None
        dvar = _like(-0.5 * scale * invstd * sum_dz_xhat, kept.var) if needs_var else None
    dx, dweight, dbias, dresidual = gradients
    return dx, dmean, dlow, dvar, dweight, dbias, dresidual, None, None, None, None


class NormalizeFunction(torch.autograd.Function):
    """y of `normalize` under autograd, with constant statistics."""

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
        attributes: Attributes,
    ) -> Tensor:
        """Compute y, and save tensors for backward."""
        with below_autograd():
            y: Tensor = normalize(x, mean, None, var, weight, bias, residual, index, *attributes)
        keep(ctx, x, residual, y, (mean, None, var, weight, bias), attributes, index)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by the operators, higher ones through plain torch operations."""
        if dy is None:
            return (None,) * 8
        *tensors, index = ctx.saved_tensors
        kept, needs = Kept(*tensors), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(dy, kept, needs, ctx.attributes, index=index)
        else:
            with below_autograd():
                gradients, _, _ = normalize_gradients(dy, kept, index, needs, ctx.attributes)
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
