"""Checks of arrays. Each error states the requirement, the value received, and the fix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm._options import (
    as_integer,
    check_alpha,
    check_choice,
    check_eps,
    check_weights,
    nonfinite_batch,
)
from batchnorm.jax.activations import ACTIVATIONS
from batchnorm.jax.composition import Attributes, values_per_channel, wide

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def checked_input(caller: str, x: Any) -> Array:
    """Return x as an array of a supported dtype and at least two dimensions."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{caller} expects x to be an array, got {type(x).__name__}. Pass jnp.asarray(x).")
    x = jnp.asarray(x)
    if str(x.dtype) not in _DTYPES:
        raise TypeError(
            f"{caller} expects x of dtype {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {x.dtype}. Convert it with "
            "x.astype(jnp.float32)."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{caller} expects x with an axis of channels and at least one other axis, got shape {list(x.shape)}. Add "
            "the missing batch or channel axis."
        )
    return x


def checked_axis(caller: str, x: Array, axis: Any) -> int:
    """Return the axis of x's channels, not negative."""
    number = as_integer(axis)
    if number is None:
        raise TypeError(
            f"{caller} expects axis to be an int, got {axis!r} ({type(axis).__name__}). Pass the axis of the channels."
        )
    if not -x.ndim <= number < x.ndim:
        raise ValueError(
            f"{caller} expects axis from {-x.ndim} to {x.ndim - 1} for x of shape {list(x.shape)}, got {axis}. Pass "
            "the axis of the channels."
        )
    return number % x.ndim


def attributes(
    caller: str, x: Array, axis: int, eps: float, activation: str, negative_slope: float, alpha: float
) -> Attributes:
    """Return the checked arguments that are not arrays."""
    axis = checked_axis(caller, x, axis)
    check_eps(caller, eps)
    check_choice(caller, "activation", activation, ACTIVATIONS)
    check_alpha(caller, alpha)
    parameters = {None: 0.0, "negative_slope": float(negative_slope), "alpha": float(alpha)}
    return Attributes(axis, float(eps), activation, parameters[ACTIVATIONS[activation].parameter])


def checked_vector(caller: str, name: str, vector: Any, x: Array, axis: int) -> Array | None:
    """Return a vector `[C]` in the dtype of x's statistics."""
    if vector is None:
        return None
    vector = jnp.asarray(vector)
    channels = x.shape[axis]
    if vector.shape != (channels,):
        raise ValueError(
            f"{caller} expects {name} of shape [{channels}], one value for each channel in axis {axis} of x "
            f"{list(x.shape)}, got {list(vector.shape)}. Pass a vector, or another axis."
        )
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        raise TypeError(
            f"{caller} expects {name} of a floating-point dtype, got {vector.dtype}. Convert it with "
            f"{name}.astype(jnp.float32)."
        )
    return vector.astype(wide(x))


def checked_residual(caller: str, residual: Any, x: Array) -> Array | None:
    """Return the residual, which must have x's shape and dtype."""
    if residual is None:
        return None
    residual = jnp.asarray(residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{caller} expects residual of x's shape {list(x.shape)}, got {list(residual.shape)}. Reshape or broadcast "
            "it."
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"{caller} expects residual of x's dtype {x.dtype}, got {residual.dtype}. Convert it with "
            "residual.astype(x.dtype)."
        )
    return residual


def mask_as_weights(caller: str, mask: Any, x: Array, axis: int) -> Array | None:
    """Return the weights of a mask in the dtype of x's statistics: of x's shape without the axis, or with it."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if jnp.iscomplexobj(mask):
        raise TypeError(f"{caller} expects a mask of booleans or of weights, got {mask.dtype}. Use mask.astype(bool).")
    positions = tuple(size for i, size in enumerate(x.shape) if i != axis)
    if mask.ndim == x.ndim and mask.shape[axis] == 1:
        mask = jnp.squeeze(mask, axis)
    shape = x.shape if mask.ndim == x.ndim else positions
    if mask.ndim != len(shape) or any(size not in (1, wanted) for size, wanted in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"{caller} expects a mask that broadcasts to {list(positions)}, x's shape without axis {axis}, or to x's "
            f"shape {list(x.shape)}, with as many dimensions, got {list(mask.shape)}. Insert axes of size 1."
        )
    if mask.dtype != jnp.bool_ and mask.size > 0 and not isinstance(mask, jax.core.Tracer):
        check_weights(caller, float(mask.min()), float(mask.max()))
    return jnp.broadcast_to(mask.astype(wide(x)), shape)


def check_count(caller: str, x: Array, axis: int, devices: int, fix: str) -> None:
    """Refuse a batch with one value per channel, over all devices. An empty batch is allowed."""
    if values_per_channel(x, axis) * devices == 1:
        raise ValueError(
            f"{caller} expects more than 1 value per channel in training, got x of shape {list(x.shape)}. One value "
            f"has no variance: {fix}."
        )


def check_finite(caller: str, mean: Array, var: Array) -> None:
    """Check that the statistics of a batch are finite, for on_nonfinite="error".

    A traced call, as in `jax.jit`, needs `jax.experimental.checkify`, which reports the error. Without it, JAX raises a
    ValueError.

    Raises:
        FloatingPointError: a statistic is not finite.
    """
    finite = jnp.isfinite(mean) & jnp.isfinite(var)
    try:
        if finite.all():
            return
        overflow = bool((jnp.isfinite(mean) | finite).all())
    except jax.errors.ConcretizationTypeError:
        from jax.experimental import checkify  # rarely used

        checkify.check(finite.all(), nonfinite_batch(caller))
        return
    raise FloatingPointError(nonfinite_batch(caller, finite.tolist(), overflow=overflow))
