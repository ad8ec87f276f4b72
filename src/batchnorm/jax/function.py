"""Batch normalization as a function for JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from batchnorm.jax import checks, composition, training
from batchnorm.jax.composition import Attributes, Kept
from batchnorm.jax.training import Peers, Statistics


def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    mask: Array | None = None,
    axis_name: Any = None,
) -> tuple[Array, Array, Array]:
    """Normalize each channel by the batch's statistics, then add `residual` and apply `activation`.

    `y = f((x - μ)/√(σ² + eps)·weight + bias + residual)`, where μ and σ² (biased) are those of the batch.

    Args:
        x: Any shape of two or more dimensions, with the channels along `axis`; float64 (if JAX enables it), float32,
            bfloat16 or float16. An empty batch gives an empty y, and zeros as mean and var.
        weight: γ of shape `[C]`, or None for 1.
        bias: β of shape `[C]`, or None for 0.
        residual: Of x's shape and dtype; added before the activation.
        axis: The axis of the channels.
        eps: Added to the variance; positive.
        activation: The name of f, such as "relu", "leaky_relu", "silu" or "elu"; "none" is the identity. The page
            "Mathematics" lists all names, with formulas.
        negative_slope: Slope of "leaky_relu" below zero.
        alpha: α of "elu", which tends to -α below zero.
        mask: The positions that count in the statistics: booleans or weights w >= 0. It broadcasts to x's shape
            without `axis`, or (with as many dimensions as x) to x's shape, so that channels may have masks of their
            own. μ = Σw·x/Σw, and σ² = Σw·(x - μ)²/Σw. Positions that do not count may hold any value, even NaN (treated
            as 0), and are normalized like the rest. If nothing counts, mean and var are 0; if a single value counts,
            its output is f(bias).
        axis_name: The name of a mapped axis (of `shard_map`, `pmap` or `vmap`), or a tuple of names, whose devices
            share the statistics. Mean and var are then the same on all of them.

    Returns:
        y of x's shape and dtype, and mean and biased var of shape `[C]`, which are float64 for float64 x, else float32.
        All are differentiable, in forward and reverse mode, to any order.

    Raises:
        TypeError: x is not an array of a supported dtype, axis is not an int, weight or bias is not of a floating-point
            dtype, the residual does not have x's dtype, or the mask is complex.
        ValueError: x has fewer than two dimensions, or one value per channel (over all devices of `axis_name`); a
            vector is not `[C]`; the residual's shape differs from x's; the mask does not broadcast or, outside of
            `jit`, has a weight below 0; axis, eps, activation or alpha is invalid.

    Numerics:
        Statistics are sums of deviations from a value close to the mean, and the mean is a pair of numbers, so that
        even a mean of 1e6 standard deviations costs no accuracy. On the CPU, the compiled kernels run on XLA's threads.
        Results and gradients have the same bits as those of `batchnorm.functional.batch_norm` for PyTorch, also with a
        mask, except that dx is 0 where a value that does not count is NaN or infinite. `batchnorm.backends()` says
        whether the kernels run. On other devices, and for arrays that `jit` shards over several devices, XLA compiles a
        composition. With `axis_name`, or with a mask that differs by channel, statistics are combined in float32, and
        results may differ in the last bits.

    Source: Ioffe & Szegedy 2015, algorithm 1; the equations are on the mathematics page, "Forward".

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, mean, var = batch_norm(x, activation="relu")
        >>> y.round(4).tolist(), mean.tolist(), var.tolist()
        ([[0.0, 0.0], [1.0, 1.0]], [2.0, 20.0], [1.0, 100.0])
    """
    y, statistics = train(
        "batch_norm", x, weight, bias, residual, axis=axis, eps=eps, activation=activation,
        negative_slope=negative_slope, alpha=alpha, mask=mask, axis_name=axis_name,
    )  # fmt: skip
    return y, statistics.mean + statistics.mean_low, statistics.var


def train(
    caller: str,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    *,
    axis: int,
    eps: float,
    activation: str,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    mask: Array | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    single_allowed: bool = False,
    fix_of_single: str = "use a larger batch, or normalize by given statistics",
) -> tuple[Array, Statistics]:
    """Return y and the statistics of `batch_norm`, for layers.

    Args:
        caller: The name at the start of error messages.
        x: As for `batch_norm`, like the other arguments of that name.
        weight: γ.
        bias: β.
        residual: Added before the activation.
        axis: The axis of the channels.
        eps: Added to the variance.
        activation: The name of f.
        negative_slope: Slope of "leaky_relu".
        alpha: α of "elu".
        mask: The positions that count.
        axis_name: The mapped axis.
        axis_index_groups: Groups of indices within the axis; each shares its own statistics. None: one group.
        single_allowed: Whether a batch may have one value per channel, whose output is then f(bias).
        fix_of_single: What to do about such a batch, for the error message.
    """
    x = checks.checked_input(caller, x)
    at = checks.attributes(caller, x, axis, eps, activation, negative_slope, alpha)
    weight = checks.checked_vector(caller, "weight", weight, x, at.axis)
    bias = checks.checked_vector(caller, "bias", bias, x, at.axis)
    residual = checks.checked_residual(caller, residual, x)
    weights = checks.mask_as_weights(caller, mask, x, at.axis)
    peers = peers_of(axis_name, axis_index_groups)
    if not single_allowed:
        checks.check_count(caller, x, at.axis, 1 if peers is None else peers.size(), fix_of_single)
    if weights is not None:
        weights = lax.stop_gradient(weights)
        x = finite_where_masked(x, weights, at.axis)
    return training.train(x, weight, bias, residual, weights, at, peers)


def peers_of(axis_name: Any, axis_index_groups: Any) -> Peers | None:
    """Return the devices that share statistics; None if each has its own."""
    if axis_name is None:
        return None
    groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))
    return Peers(tuple(axis_name) if isinstance(axis_name, list) else axis_name, groups)


def finite_where_masked(x: Array, weights: Array, axis: int) -> Array:
    """Return x with 0 at masked positions that are not finite."""
    counts = composition.spread_weights(weights, x, axis) > 0
    return jnp.where(counts | jnp.isfinite(x), x, 0)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
) -> Array:
    """Normalize each channel by given statistics, as at inference, then add `residual` and apply `activation`.

    `y = f((x - mean)/√(var + eps)·weight + bias + residual)`. This is a composition of `jax.numpy`, which XLA fuses
    with the operations around it, and which `jax.export` can export.

    Args:
        x: Any shape of two or more dimensions, with the channels along `axis`; any dtype that `batch_norm` takes.
        mean: `[C]`, such as the running mean.
        var: `[C]`, likewise.
        weight: γ of shape `[C]`, or None for 1.
        bias: β of shape `[C]`, or None for 0.
        residual: Of x's shape and dtype; added before the activation.
        axis: The axis of the channels.
        eps: Added to the variance; positive.
        activation: The name of f, as for `batch_norm`.
        negative_slope: Slope of "leaky_relu" below zero.
        alpha: α of "elu".

    Returns:
        y of x's shape and dtype, differentiable in every array.

    Raises:
        TypeError: as for `batch_norm`.
        ValueError: as for `batch_norm`, except that one value per channel is allowed.

    Source: Ioffe & Szegedy 2015, algorithm 2; the mathematics page, "Forward".

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> normalize(x, mean=jnp.array([1.0, 10.0]), var=jnp.array([1.0, 100.0])).round(4).tolist()
        [[0.0, 0.0], [2.0, 2.0]]
    """
    x = checks.checked_input("normalize", x)
    at = checks.attributes("normalize", x, axis, eps, activation, negative_slope, alpha)
    return infer("normalize", x, mean, var, weight, bias, residual, at)


def infer(
    caller: str,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    at: Attributes,
) -> Array:
    """Return y of `normalize`, for layers. `caller` is the name in error messages; x and `at` are checked already."""
    vectors = {"mean": mean, "var": var, "weight": weight, "bias": bias}
    found = {name: checks.checked_vector(caller, name, vector, x, at.axis) for name, vector in vectors.items()}
    kept = Kept(x, checks.checked_residual(caller, residual, x), mean_low=None, **found)  # type: ignore[arg-type]
    return composition.normalize(kept, at)
