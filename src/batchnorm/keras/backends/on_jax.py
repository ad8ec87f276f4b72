"""The layer on JAX: `batchnorm.jax`."""

from __future__ import annotations

from typing import Any

from jax import Array
from keras import ops

from batchnorm._options import LEAST_EPS
from batchnorm.jax import function
from batchnorm.jax.composition import values_per_channel
from batchnorm.keras.backends.call import Call, Statistics

FUSES = True


def check_synchronized() -> None:
    """Accept: under a distribution, an array and its statistics are those of all devices of the mesh."""


def normalize(x: Array, mean: Any, variance: Any, gamma: Any, beta: Any, call: Call) -> Array:
    """Return y by given statistics."""
    return function.normalize(x, _vector(mean), _vector(variance), _vector(gamma), _vector(beta), **_options(call))


def batch_norm(x: Array, gamma: Any, beta: Any, counts: Any, call: Call) -> tuple[Array, Statistics]:
    """Return y and the statistics."""
    y, found = function.train(
        "BatchNormalization", x, _vector(gamma), _vector(beta), None, mask=counts, single_allowed=True,
        **_options(call),
    )  # fmt: skip
    mean, variance = ops.stop_gradient(found.mean + found.mean_low), ops.stop_gradient(found.var)
    count: Any = values_per_channel(x, call.axis)
    if count and counts is not None:
        others = [i for i in range(x.ndim) if i != call.axis]
        count = ops.sum(ops.broadcast_to(counts, x.shape), others)
    return y, Statistics(mean, variance, count)


def _vector(value: Any) -> Any:
    return None if value is None else ops.convert_to_tensor(value)


def _options(call: Call) -> dict[str, Any]:
    return {
        "axis": call.axis,
        "eps": max(call.epsilon, LEAST_EPS),  # Keras accepts 0
        "activation": call.activation,
        "negative_slope": call.parameter,
        "alpha": call.parameter,
    }
