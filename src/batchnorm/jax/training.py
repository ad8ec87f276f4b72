"""Normalization by the batch's statistics, with derivatives of every order and in both modes.

Each function is a `jax.custom_jvp` whose tangent is linear in a primitive (or two, over devices). The transposes of
these primitives are the kernels' backward pass. So forward mode needs no rule of its own, and reverse mode costs what
the kernels cost. The derivatives of the backward pass are those of its composition.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from batchnorm.jax import composition
from batchnorm.jax.composition import Attributes, Kept, Tangents, safe_divide
from batchnorm.jax.primitives import alike, linear, operator

_train_forward = operator(composition.train_forward)
_moments = operator(composition.moments)
_normalize = operator(composition.normalize)
_train_backward = operator(composition.train_backward)
_backward_reduce = operator(composition.backward_reduce)
_backward_apply = operator(composition.backward_apply)


class Statistics(NamedTuple):
    """A batch's statistics `[C]`; count is the number of values, or the sum of their weights."""

    count: Array  # type: ignore[assignment]  # a tuple's method of this name is not needed
    mean: Array
    mean_low: Array
    var: Array


class Peers(NamedTuple):
    """The devices that share statistics: an axis name (or several), and groups of indices within it."""

    axis_name: Any
    groups: Any = None

    def size(self) -> int:
        """Return the number of devices in a group."""
        return len(self.groups[0]) if self.groups else int(lax.psum(1, self.axis_name))

    def sum(self, *values: Array) -> tuple[Array, ...]:
        """Return the sums over the devices."""
        found: tuple[Array, ...] = lax.psum(values, self.axis_name, axis_index_groups=self.groups)
        return found


def train(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    weights: Array | None,
    at: Attributes,
    peers: Peers | None,
) -> tuple[Array, Statistics]:
    """Return y and the batch's statistics.

    Args:
        x: Any shape with the channels along `at.axis`.
        weight: γ `[C]` in the statistics' dtype, or None.
        bias: β `[C]`, likewise.
        residual: Of x's shape and dtype, or None.
        weights: Of the mask, in the statistics' dtype; of x's shape without the axis, or with it. None: all count.
        at: The other arguments.
        peers: The devices that share the statistics, or None.
    """
    one_weight_per_position = weights is None or weights.ndim < x.ndim  # otherwise, only some halves have a kernel
    if peers is None and one_weight_per_position:
        y, *statistics = _local(x, weight, bias, residual, weights, at)
    else:
        y, *statistics = _by_halves(x, weight, bias, residual, weights, at, peers)
    return y, Statistics(*statistics)


def _kept(x: Array, residual: Array | None, statistics: Any, weight: Any, bias: Any, at: Attributes) -> Kept:
    """Return the tensors for backward, which needs the residual only for the derivative of an activation."""
    mean, mean_low, var = statistics
    return Kept(x, None if at.activation == "none" else residual, mean, mean_low, var, weight, bias)


def _zeros_like(array: Array) -> Array:
    return alike(jnp.zeros_like(array), array)[0]


# ---- the linear primitives -----------------------------------------------------------------------------------------


def _residual_gradient(dz: list[Array], dy: Array) -> Array:
    """Return dz, which without an activation is dy."""
    return dz[0] if dz else dy


def _transpose_train_tangent(cotangents: Any, constants: Any, at: Attributes) -> Tangents:
    (dy,) = cotangents
    sum_dz, sum_dz_xhat, dx, *dz = _train_backward(dy, *constants, at)
    return Tangents(dx, _residual_gradient(dz, dy), sum_dz_xhat, sum_dz)


def _transpose_tangent_apply(cotangents: Any, constants: Any, at: Attributes) -> tuple[Array, Array]:
    dy, mean_dxhat, mean_dxhat_xhat = cotangents
    dx, *dz = _backward_apply(dy, mean_dxhat, mean_dxhat_xhat, *constants, at)
    return dx, _residual_gradient(dz, dy)


def _transpose_tangent_reduce(cotangents: Any, kept: Kept, at: Attributes) -> list[Array]:
    (dy,) = cotangents
    sums: list[Array] = _backward_reduce(dy, kept, at)
    return sums


_train_tangent = linear(composition.train_tangent, _transpose_train_tangent)
_tangent_apply = linear(composition.tangent_apply, _transpose_tangent_apply)
_tangent_reduce = linear(composition.tangent_reduce, _transpose_tangent_reduce)


# ---- on one device: fused -------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _local(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    weights: Array | None,
    at: Attributes,
) -> Any:
    return tuple(_train_forward(x, weight, bias, residual, weights, at))


@_local.defjvp
def _local_jvp(at: Attributes, primals: Any, tangents: Any) -> Any:
    x, weight, bias, residual, weights = primals
    x_dot, weight_dot, bias_dot, residual_dot, _ = tangents
    y, count, *statistics = _local(*primals, at)
    constants = _kept(x, residual, statistics, weight, bias, at), weights
    (y_dot,) = _train_tangent(Tangents(x_dot, residual_dot, weight_dot, bias_dot), constants, at)
    _, p, q = _tangent_apply((x_dot, None), constants, at)
    dots = _statistics_dots(p, q, count, statistics, at)
    return (y, count, *statistics), (y_dot, _zeros_like(count), *dots)


def _statistics_dots(p: Array, q: Array, count: Array, statistics: Any, at: Attributes) -> tuple[Array, Array, Array]:
    """Return the tangents of mean, mean_low and var: that of mean is the tangent of the pair, that of mean_low is 0."""
    mean, _, var = statistics
    std = jnp.sqrt(var + at.eps)
    return -std * safe_divide(p, count), _zeros_like(mean), -2.0 * jnp.square(std) * safe_divide(q, count)


# ---- over devices, or with a mask that differs by channel: in halves -------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _by_halves(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    weights: Array | None,
    at: Attributes,
    peers: Peers | None,
) -> Any:
    count, mean, mean_low, m2 = _moments(x, weights, at)
    if peers is not None:
        count, mean, mean_low, m2 = _merge(count, mean, mean_low, m2, peers)
    statistics = mean, mean_low, safe_divide(m2, count)
    (y,) = _normalize(Kept(x, residual, *statistics, weight, bias), at)
    return y, count, *statistics


def _merge(count: Array, mean: Array, mean_low: Array, m2: Array, peers: Peers) -> tuple[Array, Array, Array, Array]:
    """Merge the moments of all devices by Chan's formula: exact also if their means are far apart.

    The mean of the means is the pivot. Means and squares are then sums of small deviations from it.

    Source: Chan, Golub & LeVeque 1979; the mathematics page, "Merging moments".
    """
    total, sums = peers.sum(count, count * mean)
    pivot = composition.materialized(safe_divide(sums, total))
    deviation = jnp.where(count > 0, (mean - pivot) + mean_low, 0)
    shifts, squares = peers.sum(count * deviation, m2 + count * jnp.square(deviation))
    shift = safe_divide(shifts, total)
    return total, pivot, shift, jnp.maximum(squares - total * jnp.square(shift), 0)


@_by_halves.defjvp
def _by_halves_jvp(at: Attributes, peers: Peers | None, primals: Any, tangents: Any) -> Any:
    x, weight, bias, residual, weights = primals
    x_dot, weight_dot, bias_dot, residual_dot, _ = tangents
    y, count, *statistics = _by_halves(*primals, at, peers)
    kept = _kept(x, residual, statistics, weight, bias, at)
    u, p, q = _tangent_apply((x_dot, residual_dot), (kept, weights), at)
    if peers is not None:
        p, q = peers.sum(p, q)
    dots = Tangents(x_dot, residual_dot, weight_dot, bias_dot)
    means = composition.tangent_means(p, q, count, weight, dots)
    (v,) = _tangent_reduce(tuple(means), kept, at)
    statistics_dots = _statistics_dots(p, q, count, statistics, at)
    return (y, count, *statistics), (u + v, _zeros_like(count), *statistics_dots)
