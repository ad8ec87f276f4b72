"""Forward and backward, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from batchnorm.reference.activations import ACTIVATIONS
from batchnorm.reference.layout import Array, divisor, float64, layout_of, require, shaped, weights_of
from batchnorm.reference.results import DoubleGradients, Forward, Gradients, GradientsByParts
from batchnorm.reference.statistics import moments


def forward_training(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    index: ArrayLike | None = None,
    groups: int | None = None,
    axis: int = 1,
    **options: Any,
) -> Forward:
    """Return y and its intermediates, normalized by the batch's own mean and biased variance.

        μ = Σ x/m    σ² = Σ (x − μ)²/m    x̂ = (x − μ)/√(σ² + ε)    y = γ·x̂ + β

    Source: Ioffe & Szegedy 2015, Algorithm 1. Section 1; section 4 for weights.

    Args:
        x: `[N, C, *S]`.
        weight: γ, `[C]`, or `[K, C]` with index.
        bias: β, like `weight`.
        weights: `[N, *S]`, the weight of each value in the statistics; all values are normalized.
        index: `[N]`, the row of `[K, C]` for each sample.
        groups: K. Each group of samples with the same index then has its own statistics. Without groups, the statistics
            are those of the whole batch, and index selects only γ and β.
        axis: The channel axis of x.
        **options: residual, activation, negative_slope and eps, as in `normalize`.

    Raises:
        ValueError: a channel (of a group) has a single value.
    """
    batch = moments(x, weights=weights, index=None if groups is None else index, groups=groups, axis=axis)
    batch.require_several()
    forward = normalize(x, batch.mean, batch.var, weight, bias, index=index, axis=axis, **options)
    layout = forward.layout
    share = weights_of(weights, layout) / layout.spread(divisor(batch.count)[..., None])
    return replace(forward, share=share, batch=batch)


def backward(dy: ArrayLike, forward: Forward) -> Gradients:
    """Return the gradients in closed form.

        dz = dy·f′(z)    dβ = Σ dz    dγ = Σ dz·x̂    dx̂ = γ·dz
        dx = invstd·(dx̂ − Σ dx̂/m − x̂·Σ(dx̂·x̂)/m)

    With weights, w/V₁ replaces 1/m; at inference, 0 replaces it. Source: `backward_by_parts`, simplified. Section 3.

    Args:
        dy: Gradient of y, like x.
        forward: The forward pass, of any kind.
    """
    spread, total, share, x_hat = forward.layout.spread, forward.layout.total, forward.share, forward.x_hat
    dz, dweight, dbias, dx_hat = _affine_backward(dy, forward)
    sum_dx_hat = total(dx_hat, like=forward.mean)
    sum_dx_hat_x_hat = total(dx_hat * x_hat, like=forward.mean)
    dx = spread(forward.invstd) * (dx_hat - share * (spread(sum_dx_hat) + x_hat * spread(sum_dx_hat_x_hat)))
    return Gradients(dz, dweight, dbias, dx_hat, dx)


def backward_by_parts(dy: ArrayLike, forward: Forward) -> GradientsByParts:
    """Return the gradients by the chain rule, through x̂, then σ², then μ, with the arguments of `backward`.

        dx̂  = dz·γ
        dσ² = Σ dx̂·(x − μ)·(−½)·(σ² + ε)^(−3/2)
        dμ  = Σ dx̂·(−1/√(σ² + ε)) + dσ²·Σ(−2(x − μ))/m
        dx  = dx̂/√(σ² + ε) + dσ²·2(x − μ)/m + dμ/m

    At inference 1/m is 0, and dσ² and dμ are the gradients of the given statistics.
    Source: Ioffe & Szegedy 2015, section 3, the six equations after Algorithm 1. Section 3.
    """
    spread, total, share = forward.layout.spread, forward.layout.total, forward.share
    x_centered, invstd = forward.x_centered, forward.invstd
    dz, dweight, dbias, dx_hat = _affine_backward(dy, forward)
    dvar = total(dx_hat * x_centered, like=invstd) * -0.5 * invstd**3
    dmean = total(dx_hat, like=invstd) * -invstd + dvar * total(-2 * share * x_centered, like=invstd)
    dx = dx_hat * spread(invstd) + spread(dvar) * 2 * share * x_centered + spread(dmean) * share
    return GradientsByParts(dz, dweight, dbias, dx_hat, dx, dvar, dmean)


def forward_inference(
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    **options: Any,
) -> Forward:
    """Return y and its intermediates, normalized by the running statistics.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 12. Section 2.
    """
    return normalize(x, running_mean, running_var, weight, bias, **options)


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    residual: ArrayLike | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    eps: float = 1e-5,
    index: ArrayLike | None = None,
    axis: int = 1,
) -> Forward:
    """Return y and its intermediates, normalized by given statistics that do not depend on x.

        x̂ = (x − μ)/√(σ² + ε)    z = γ·x̂ + β + residual    y = f(z)

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 3 and 4. Section 1.

    Args:
        x: `[N, C, *S]`.
        mean: μ, `[C]` or `[K, C]`.
        var: σ², like `mean`, >= 0.
        weight: γ, `[C]` or `[K, C]`, independent of the shape of the statistics. Default 1.
        bias: β, like `weight`. Default 0.
        residual: Like x. Default 0.
        activation: The name of f in `ACTIVATIONS`.
        negative_slope: The negative slope of leaky_relu, or α of elu.
        eps: ε, >= 0.
        index: `[N]`, the row of `[K, C]` for each sample.
        axis: The channel axis of x.
    """
    x = float64(x)
    layout = layout_of(x, axis, index)
    mean, var = layout.per_channel("mean", mean), layout.per_channel("var", var)
    weight = np.ones(x.shape[axis] if bias is None else np.shape(bias)) if weight is None else weight
    weight = layout.per_channel("weight", weight)
    bias = layout.per_channel("bias", np.zeros_like(weight) if bias is None else bias)
    for names, a, b in (("mean and var", mean, var), ("weight and bias", weight, bias)):
        require(a.shape == b.shape, f"{names} must have one shape", [a.shape, b.shape], "Expand the smaller one.")
    require(not (var < 0).any() and eps >= 0, "var and eps must be >= 0", [var.min(initial=0), eps], "Pass σ².")
    require(activation in ACTIVATIONS, f"activation must be one of {[*ACTIVATIONS]}", activation, "Choose one.")
    f, derivative = ACTIVATIONS[activation]

    x_centered = x - layout.spread(mean)
    invstd = 1 / np.sqrt(var + eps)
    x_hat = x_centered * layout.spread(invstd)
    z = layout.spread(weight) * x_hat + layout.spread(bias)
    if residual is not None:
        z = z + shaped("residual", residual, x.shape)
    y, slope = f(z, negative_slope), derivative(z, negative_slope)
    return Forward(mean, var, x_centered, invstd, x_hat, z, y, weight, slope, layout, np.zeros(()), None)


def double_backward(
    v: ArrayLike, v_weight: ArrayLike, v_bias: ArrayLike, dz: ArrayLike, forward: Forward
) -> DoubleGradients:
    """Return the gradients of the gradients, by differentiating dx, dγ and dβ as functions of dz, x and γ.

    Here, mean and invstd are also functions of x. If they were constants, first derivatives would be correct, but
    second ones would be wrong. With P(t) = t − mean t − x̂·mean(t·x̂) and u = γ·dz:

        to dz:  γ·invstd·P(v) + x̂·v_γ + v_β
        to γ:   Σ invstd·dz·P(v)
        to x:   −invstd²·[x̂·mean(v·P(u)) + mean(u·x̂)·P(v) + mean(v·x̂)·P(u)] + invstd·P(v_γ·dz)

    With weights, P(u) and P(v_γ·dz) become Q(u) and Q(v_γ·dz), where Q is the transpose of P. Section 3.

    Args:
        v: The incoming gradient of dx, like x.
        v_weight: v_γ, the incoming gradient of dγ, like γ.
        v_bias: v_β, the incoming gradient of dβ, like γ.
        dz: `Gradients.dz` of `backward`, like x; without an activation, it is dy.
        forward: The forward pass, of any kind.
    """
    layout, weight, x_hat, share = forward.layout, forward.weight, forward.x_hat, forward.share
    v, dz = shaped("v", v, layout.shape), shaped("dz", dz, layout.shape)
    v_gamma = layout.spread(shaped("v_weight", v_weight, weight.shape))
    v_beta = layout.spread(shaped("v_bias", v_bias, weight.shape))
    gamma, invstd = layout.spread(weight), layout.spread(forward.invstd)

    def sums(t: Array) -> Array:
        return layout.spread(layout.total(t, like=forward.mean))

    def p(t: Array) -> Array:
        return np.asarray(t - sums(share * t) - x_hat * sums(share * t * x_hat))

    def q(t: Array) -> Array:
        return np.asarray(t - share * (sums(t) + x_hat * sums(t * x_hat)))

    u = gamma * dz
    through_invstd = share * x_hat * sums(v * q(u))
    through_x_hat = share * sums(u * x_hat) * p(v) + sums(share * v * x_hat) * q(u)
    return DoubleGradients(
        dz=gamma * invstd * p(v) + x_hat * v_gamma + v_beta,
        dx=-(invstd**2) * (through_invstd + through_x_hat) + invstd * q(v_gamma * dz),
        dweight=layout.total(invstd * dz * p(v), like=weight),
    )


def _affine_backward(dy: ArrayLike, forward: Forward) -> tuple[Array, Array, Array, Array]:
    """Return dz, dγ, dβ and dx̂, by differentiating y = f(γ·x̂ + β + residual)."""
    layout, weight = forward.layout, forward.weight
    dz = shaped("dy", dy, layout.shape) * forward.slope
    dweight, dbias = layout.total(dz * forward.x_hat, like=weight), layout.total(dz, like=weight)
    return dz, dweight, dbias, dz * layout.spread(weight)
