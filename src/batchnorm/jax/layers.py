"""The call that both layers for Flax share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from batchnorm._options import ON_NONFINITE, ON_SINGLE, check_alpha, check_choice, check_eps, check_weight_of_old
from batchnorm.jax import checks
from batchnorm.jax.activations import ACTIVATIONS
from batchnorm.jax.composition import spread_weights, values_per_channel
from batchnorm.jax.function import finite_where_masked, infer, peers_of, train
from batchnorm.jax.training import Statistics

CALLER = "BatchNorm"
_FIX_OF_SINGLE = "use a larger batch, on_single='running' (normalizes by the running statistics), or evaluation"


class Options(NamedTuple):
    """The arguments of a layer that its call needs."""

    axis: int
    epsilon: float
    momentum: float
    activation: str
    negative_slope: float
    alpha: float
    on_nonfinite: str
    on_single: str
    axis_name: Any
    axis_index_groups: Any


class Running(NamedTuple):
    """The running statistics `[C]`; both are biased."""

    mean: Array
    var: Array


def options_of(layer: Any) -> Options:
    """Return the options from the layer's attributes, which must be in range."""
    values = {name: getattr(layer, name) for name in Options._fields}
    if isinstance(layer.axis, Sequence):
        axes = tuple(layer.axis)
        if len(axes) != 1:
            raise ValueError(
                f"{CALLER} expects axis to be one axis of channels, got {axes}. Reshape x so that it has one."
            )
        values["axis"] = axes[0]
    check_eps(CALLER, layer.epsilon, name="epsilon")
    if not isinstance(layer.momentum, Array):  # it may be traced
        check_weight_of_old(CALLER, layer.momentum)
    check_alpha(CALLER, layer.alpha)
    check_choice(CALLER, "activation", layer.activation, ACTIVATIONS)
    check_choice(CALLER, "on_nonfinite", layer.on_nonfinite, ON_NONFINITE)
    check_choice(CALLER, "on_single", layer.on_single, ON_SINGLE)
    return Options(**values)


def evaluate(
    x: Array, running: Running, scale: Array | None, bias: Array | None, residual: Array | None, options: Options
) -> Array:
    """Return y by the running statistics."""
    x = checks.checked_input(CALLER, x)
    at = checks.attributes(
        CALLER, x, options.axis, options.epsilon, options.activation, options.negative_slope, options.alpha
    )
    return infer(CALLER, x, *running, scale, bias, _like(x, residual), at)


def step(
    x: Array,
    running: Running,
    scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    mask: Array | None,
    options: Options,
    *,
    initializing: bool = False,
) -> tuple[Array, Running]:
    """Return y by the batch's statistics, and the updated running statistics.

    Args:
        x: Any shape with the channels along `options.axis`.
        running: The running statistics.
        scale: γ, or None.
        bias: β, or None.
        residual: Of x's shape, or None.
        mask: Broadcasts to x's shape, as in Flax. None: all positions count.
        options: The layer's options.
        initializing: Whether Flax creates the parameters. Any batch is then allowed, and there is no named axis yet.
    """
    if mask is not None:
        mask = jnp.asarray(mask)
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    by_running = options.on_single == "running" and not initializing
    single = by_running and _is_single(x, mask, options)
    if single is True:
        return evaluate(x, running, scale, bias, residual, options), running
    y, statistics = train(
        CALLER, x, scale, bias, _like(x, residual), axis=options.axis, eps=options.epsilon,
        activation=options.activation, negative_slope=options.negative_slope, alpha=options.alpha, mask=mask,
        axis_name=None if initializing else options.axis_name, axis_index_groups=options.axis_index_groups,
        single_allowed=initializing or by_running, fix_of_single=_FIX_OF_SINGLE,
    )  # fmt: skip
    if initializing:
        return y, running
    updated = _updated(running, statistics, options)
    if single is False:
        return y, updated
    axis = checks.checked_axis(CALLER, x, options.axis)
    weights = checks.mask_as_weights(CALLER, mask, x, axis)
    assert weights is not None
    fixed = evaluate(finite_where_masked(x, weights, axis), running, scale, bias, residual, options)
    others = [i for i in range(x.ndim) if i != axis]
    y = jnp.where(jnp.expand_dims(single, others), fixed, y)
    return y, Running(*(jnp.where(single, old, new) for old, new in zip(running, updated, strict=True)))


def _is_single(x: Array, mask: Array | None, options: Options) -> bool | Array:
    """Return whether each channel has a single value over all devices; with a mask, which have at most one, `[C]`."""
    axis = checks.checked_axis(CALLER, x, options.axis)
    peers = peers_of(options.axis_name, options.axis_index_groups)
    weights = checks.mask_as_weights(CALLER, mask, x, axis)
    if weights is None:
        return values_per_channel(x, axis) * (1 if peers is None else peers.size()) == 1
    counts = jnp.broadcast_to(spread_weights(weights, x, axis) > 0, x.shape)
    number = counts.sum([i for i in range(x.ndim) if i != axis])
    return (number if peers is None else peers.sum(number)[0]) <= 1


def _like(x: Array, residual: Array | None) -> Array | None:
    return None if residual is None else jnp.asarray(residual).astype(x.dtype)


def _updated(running: Running, statistics: Statistics, options: Options) -> Running:
    """Return momentum·running + (1 - momentum)·batch, or `running` where nothing counts or values are skipped."""
    count, mean, mean_low, var = lax.stop_gradient(statistics)
    batch = Running(mean + mean_low, var)
    counts = count > 0
    if options.on_nonfinite == "error":
        checks.check_finite(CALLER, *batch)
    if options.on_nonfinite != "propagate":
        counts = counts & jnp.all(jnp.isfinite(batch.mean) & jnp.isfinite(batch.var))

    def update(old: Array, new: Array) -> Array:
        moved = options.momentum * old + (1 - options.momentum) * new
        return jnp.where(counts, moved, old).astype(old.dtype)

    return Running(*map(update, running, batch))
