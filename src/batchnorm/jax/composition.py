"""The operators as compositions in `jax.numpy`: for every device, and for derivatives of every order.

x, y, dy, residual, dx and dz have one shape, with the channels along `axis`. Statistics and affine vectors are `[C]`,
in float64 for float64 x, else in float32. `weights` are those of a mask: of x's shape without `axis`, or with it if
they differ by channel. An absent array is None. With the weights w (or 1):

    d = (x - mean) - mean_low      x̂ = d/√(var + eps)      z = x̂·weight + bias + residual      y = f(z)

The tangent of y, with mean and var as functions of x, is the sum of two linear maps. Each is the transpose of one half
of the backward pass, so that a sum over devices can stand between them:

    tangent_apply:   ẋ, ṙ → u = f′(z)·(weight/√(var + eps)·ẋ + ṙ),  p = -Σ w·ẋ/√(var + eps),  q = -Σ w·ẋ·x̂/√(var + eps)
    tangent_reduce:  P, Q → v = f′(z)·(P + x̂·Q)
    ẏ = u + v   for   P = weight·p/Σw + bias˙,   Q = weight·q/Σw + weight˙

Source: the mathematics page, "Backward".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from batchnorm.jax.activations import ACTIVATIONS, activate


class Attributes(NamedTuple):
    """The arguments that are not arrays; axis is not negative."""

    axis: int
    eps: float = 1e-5
    activation: str = "none"
    parameter: float = 0.0


class Kept(NamedTuple):
    """The arrays that determine y, which backward needs again. The mean is the pair `mean + mean_low`."""

    x: Array
    residual: Array | None
    mean: Array
    mean_low: Array | None
    var: Array
    weight: Array | None
    bias: Array | None


def wide(x: Array) -> jnp.dtype:
    """Return the dtype of x's statistics."""
    return jnp.promote_types(x.dtype, jnp.float32)


def spread(vector: Array, x: Array, axis: int) -> Array:
    """Return the vector `[C]`, or `[1]`, in a shape that broadcasts to x's."""
    return vector.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))


def sum_positions(values: Array, axis: int) -> Array:
    """Return the sums `[C]` over all positions."""
    return jnp.sum(values, tuple(i for i in range(values.ndim) if i != axis))


def spread_weights(weights: Array, x: Array, axis: int) -> Array:
    """Return the weights of a mask in a shape that broadcasts to x's."""
    return weights if weights.ndim == x.ndim else jnp.expand_dims(weights, axis)


def safe_divide(sums: Array, count: Array) -> Array:
    """Return sums/count, or 0 where nothing counts."""
    return jnp.where(count > 0, sums / jnp.where(count > 0, count, 1), 0)


def materialized(values: Array) -> Array:
    """Return the values rounded to one bit less, so that they have the same bits wherever XLA computes them.

    Otherwise, XLA may repeat a last product in every fusion that reads it, and join that product with a sum to one
    instruction that does not round it. Deviations would then be from another pivot than the returned one.
    """
    bits = jnp.finfo(values.dtype)
    return lax.reduce_precision(values, bits.nexp, bits.nmant - 1)


def values_per_channel(x: Array, axis: int) -> int:
    """Return the number of positions."""
    return math.prod(size for i, size in enumerate(x.shape) if i != axis)


def count_values(x: Array, weights: Array | None, axis: int) -> Array:
    """Return the number of values `[C]`, or the sums of their weights."""
    channels = x.shape[axis]
    if weights is None:
        return jnp.full(channels, values_per_channel(x, axis), wide(x))
    return jnp.broadcast_to(sum_positions(spread_weights(weights, x, axis).astype(wide(x)), axis), channels)


# ---- statistics ----------------------------------------------------------------------------------------------------


def moments(x: Array, weights: Array | None, at: Attributes) -> tuple[Array, Array, Array, Array]:
    """Return count, mean, mean_low and Σ w·(x - mean)², all `[C]`.

    The first pass over x gives a pivot, and the second the moments of the deviations from it. The pivot is rounded, but
    close to the mean, so that the deviations are exact, or nearly so. It is the result's mean, and mean_low is the mean
    of the deviations.
    """
    w = None if weights is None else spread_weights(weights, x, at.axis).astype(wide(x))
    count = count_values(x, weights, at.axis)
    if w is not None:
        x = jnp.where(w > 0, x, 0)  # the square of a value that does not count could overflow

    def mean_of(values: Array) -> Array:
        return safe_divide(_sum_in_stages(values if w is None else w * values, at.axis), count)

    values = x.astype(wide(x))
    pivot = materialized(mean_of(values))
    deviations = values - spread(pivot, x, at.axis)
    shift = mean_of(deviations)
    m2 = count * jnp.maximum(mean_of(jnp.square(deviations)) - jnp.square(shift), 0)
    return count, pivot, shift, m2


def _sum_in_stages(values: Array, axis: int) -> Array:
    """Return the sums `[C]` over all positions, summed along one axis after the other, the samples last.

    XLA may add the values of a sum one by one, so that the error grows with their number. `materialized` prevents
    XLA from merging the stages into one sum.
    """
    *within, sample = [i for i in reversed(range(values.ndim)) if i != axis]
    for position in within:
        values = materialized(jnp.sum(values, position, keepdims=True))
    return jnp.sum(values, sample, keepdims=True).reshape(-1)


def train_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    weights: Array | None,
    at: Attributes,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return y, and the batch's count, mean, mean_low and biased variance."""
    count, mean, mean_low, m2 = moments(x, weights, at)
    var = safe_divide(m2, count)
    return normalize(Kept(x, residual, mean, mean_low, var, weight, bias), at), count, mean, mean_low, var


# ---- given statistics ----------------------------------------------------------------------------------------------


def _terms(kept: Kept, at: Attributes) -> tuple[Array, Array, Array]:
    """Return x̂, z, and 1/√(var + eps) in a shape that broadcasts to x's."""
    x, axis = kept.x, at.axis
    deviations = x.astype(wide(x)) - spread(kept.mean, x, axis)
    if kept.mean_low is not None:
        deviations = deviations - spread(kept.mean_low, x, axis)
    invstd = 1 / jnp.sqrt(kept.var + at.eps)  # the derivative of rsqrt underflows for large values
    scale = invstd if kept.weight is None else invstd * kept.weight
    z = deviations * spread(scale, x, axis)
    if kept.bias is not None:
        z = z + spread(kept.bias, x, axis)
    if kept.residual is not None:
        z = z + kept.residual.astype(z.dtype)
    invstd = spread(invstd, x, axis)
    return deviations * invstd, z, invstd


def normalize(kept: Kept, at: Attributes) -> Array:
    """Return y."""
    _, z, _ = _terms(kept, at)
    return activate(z, at.activation, at.parameter).astype(kept.x.dtype)


def _derivative(z: Array, at: Attributes) -> Array:
    return ACTIVATIONS[at.activation].derivative(z, at.parameter)


def _weighted(values: Array, kept: Kept, at: Attributes) -> Array:
    return values if kept.weight is None else values * spread(kept.weight, kept.x, at.axis)


# ---- the backward pass ---------------------------------------------------------------------------------------------


def _dz(dy: Array, z: Array, at: Attributes) -> Array:
    return dy.astype(z.dtype) * _derivative(z, at)


def backward_reduce(dy: Array, kept: Kept, at: Attributes) -> tuple[Array, Array]:
    """Return Σ dz and Σ dz·x̂."""
    xhat, z, _ = _terms(kept, at)
    dz = _dz(dy, z, at)
    return sum_positions(dz, at.axis), sum_positions(dz * xhat, at.axis)


def backward_apply(
    dy: Array, mean_dxhat: Array, mean_dxhat_xhat: Array, kept: Kept, weights: Array | None, at: Attributes
) -> tuple[Array, Array | None]:
    """Return dx from the means of dx̂ and of dx̂·x̂, and dz if there is a residual."""
    x, axis = kept.x, at.axis
    xhat, z, invstd = _terms(kept, at)
    dz = _dz(dy, z, at)
    through = spread(mean_dxhat, x, axis) + xhat * spread(mean_dxhat_xhat, x, axis)
    if weights is not None:
        through = through * spread_weights(weights, x, axis)
    dx = invstd * (_weighted(dz, kept, at) - through)
    return dx.astype(x.dtype), None if kept.residual is None else dz.astype(x.dtype)


def train_backward(
    dy: Array, kept: Kept, weights: Array | None, at: Attributes
) -> tuple[Array, Array, Array, Array | None]:
    """Return Σ dz, Σ dz·x̂, dx, and dz if there is a residual; kept.mean and kept.var are those of the batch."""
    sums = backward_reduce(dy, kept, at)
    count = count_values(kept.x, weights, at.axis)
    mean_dxhat, mean_dxhat_xhat = (safe_divide(s if kept.weight is None else s * kept.weight, count) for s in sums)
    return *sums, *backward_apply(dy, mean_dxhat, mean_dxhat_xhat, kept, weights, at)


# ---- the tangent, in forward mode ----------------------------------------------------------------------------------


def tangent_apply(
    dots: tuple[Array, Array | None], constants: tuple[Kept, Array | None], at: Attributes
) -> tuple[Array, Array, Array]:
    """Return u, p and q for ẋ and ṙ, as at the top of this file. The transpose is `backward_apply`."""
    (x_dot, residual_dot), (kept, weights) = dots, constants
    xhat, z, invstd = _terms(kept, at)
    scaled = invstd * x_dot.astype(z.dtype)
    total = _weighted(scaled, kept, at)
    if residual_dot is not None:
        total = total + residual_dot.astype(z.dtype)
    u = (_derivative(z, at) * total).astype(kept.x.dtype)
    if weights is not None:
        scaled = scaled * spread_weights(weights, kept.x, at.axis)
    return u, -sum_positions(scaled, at.axis), -sum_positions(scaled * xhat, at.axis)


def tangent_reduce(means: tuple[Array, Array], kept: Kept, at: Attributes) -> Array:
    """Return v for P and Q, as at the top of this file. The transpose is `backward_reduce`."""
    xhat, z, _ = _terms(kept, at)
    constant, slope = (spread(t, kept.x, at.axis) for t in means)
    v = _derivative(z, at) * (constant + xhat * slope)
    return v.astype(kept.x.dtype)


class Tangents(NamedTuple):
    """The tangents of x, residual, weight and bias; None where these are None."""

    x: Array
    residual: Array | None
    weight: Array | None
    bias: Array | None


def tangent_means(p: Array, q: Array, count: Array, weight: Array | None, dots: Tangents) -> tuple[Array, Array]:
    """Return P and Q, as at the top of this file, from p and q over all devices."""
    p, q = (safe_divide(t if weight is None else t * weight, count) for t in (p, q))
    return (p if dots.bias is None else p + dots.bias), (q if dots.weight is None else q + dots.weight)


def train_tangent(dots: Tangents, constants: tuple[Kept, Array | None], at: Attributes) -> Array:
    """Return y's tangent, where kept.mean and kept.var are those of the batch. The transpose is `train_backward`."""
    kept, weights = constants
    u, p, q = tangent_apply((dots.x, dots.residual), constants, at)
    count = count_values(kept.x, weights, at.axis)
    means = tangent_means(p, q, count, kept.weight, dots)
    return u + tangent_reduce(means, kept, at)
