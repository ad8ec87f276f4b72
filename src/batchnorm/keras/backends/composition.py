"""Batch normalization in `keras.ops`, for TensorFlow, NumPy and any other backend.

The batch's mean, without a gradient, is a pivot. The mean and the variance come from the deviations from it, so that a
large mean costs no accuracy. A sum over one long axis in float32 loses digits, too, and XLA and Eigen add the values of
one axis one after another. Therefore, means are computed axis by axis, and a long axis in blocks. Each stage ends with
a division, without which XLA would merge the stages into one.

On TensorFlow, backward is one function instead of the derivatives of all operations, which halves its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from batchnorm.keras.backends.call import Call, Statistics

FUSES = False

_LONG = 512  # the longest axis that is summed in one go
_BLOCK = 64


def check_synchronized() -> None:
    """Refuse to synchronize on a backend without replicas."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            "BatchNormalization expects synchronized=False on a backend that trains on one device, got True with the "
            f"{backend} backend. Use synchronized=False, or the torch, JAX or TensorFlow backend."
        )


def wide(x: Any) -> Any:
    """Return x in the dtype of its statistics: float64 for float64, else float32."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def spread(vector: Any, x: Any, axis: int) -> Any:
    """Return `[C]` in a shape that broadcasts to x's."""
    return ops.reshape(vector, [-1 if i == axis else 1 for i in range(len(x.shape))])


def normalize(x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, call: Call) -> Any:
    """Return y by given statistics, in their dtype."""
    x = wide(x)
    mean, variance, gamma, beta = (None if t is None else ops.cast(t, x.dtype) for t in (mean, variance, gamma, beta))
    return _affine(x - spread(mean, x, call.axis), variance, gamma, beta, call)


def _affine(deviation: Any, variance: Any, gamma: Any, beta: Any, call: Call) -> Any:
    scale = ops.rsqrt(variance + call.epsilon)
    y = deviation * spread(scale if gamma is None else scale * gamma, deviation, call.axis)
    return y if beta is None else y + spread(beta, deviation, call.axis)


def finite_where_masked(x: Any, counts: Any) -> Any:
    """Return x with zeros instead of the values that are not finite and do not count."""
    return ops.where(ops.logical_or(counts, ops.isfinite(x)), x, ops.zeros((), x.dtype))


def batch_norm(x: Any, gamma: Any, beta: Any, counts: Any, call: Call) -> tuple[Any, Statistics]:
    """Return y in the statistics' dtype, and the statistics."""
    x = wide(x)
    weights = None
    if counts is not None:
        weights = ops.cast(counts, x.dtype)
        x = finite_where_masked(x, counts)
    channels = ops.shape(x)[call.axis]
    gamma = ops.ones((channels,), x.dtype) if gamma is None else ops.cast(gamma, x.dtype)
    beta = ops.zeros((channels,), x.dtype) if beta is None else ops.cast(beta, x.dtype)
    averages = _Averages(x, weights, call)

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        pivot = ops.stop_gradient(averages.of(x))
        deviation = x - spread(pivot, x, call.axis)
        shift = averages.of(deviation)
        deviation = deviation - spread(shift, x, call.axis)
        variance = averages.of(ops.square(deviation))
        y = _affine(deviation, variance, gamma, beta, call)

        def backward(*upstream: Any) -> tuple[Any, Any, Any]:
            dy = upstream[0]  # the statistics have no gradient
            inverse = ops.rsqrt(variance + call.epsilon)
            own = averages.local(dy), averages.local(dy * deviation) * inverse
            mean_dy, mean_product = (averages.shared(t) * gamma for t in own)
            through = spread(mean_dy, x, call.axis) + deviation * spread(inverse * mean_product, x, call.axis)
            if weights is not None:
                through = through * weights
            dx = (dy * spread(gamma, x, call.axis) - through) * spread(inverse, x, call.axis)
            return dx, own[1] * averages.positions, own[0] * averages.positions

        return (y, pivot + shift, variance), backward

    y, mean, variance = _with_gradient(forward)(x, gamma, beta)
    return y, Statistics(ops.stop_gradient(mean), ops.stop_gradient(variance), averages.count)


def _with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the results, with the given gradient on TensorFlow and automatic derivatives elsewhere."""
    if keras.backend.backend() == "tensorflow":
        return ops.custom_gradient(function)
    return lambda *tensors: function(*tensors)[0]


class _Averages:
    """Averages per channel over the values that count, of all replicas if they are synchronized.

    Attributes:
        positions: The number of values per channel on this replica.
        count: The number of values per channel that count, on all replicas.
    """

    def __init__(self, x: Any, weights: Any, call: Call) -> None:
        shape = ops.shape(x)
        self._axes = [i for i in range(len(shape)) if i != call.axis]
        lengths = [shape[i] for i in self._axes]
        self._weights = None if weights is None else ops.broadcast_to(weights, shape)
        self._reduce = _sum_over_replicas() if call.synchronized else None
        self.count: Any
        self.positions: Any
        if all(isinstance(length, int) for length in lengths):
            self.positions = math.prod(lengths)
        else:
            self.positions = ops.cast(ops.prod(ops.stack(lengths)), x.dtype)
        if self._weights is None and self._reduce is None:
            self._factor = None
            self.count = self.positions
            return
        share = ops.ones((), x.dtype) if self._weights is None else self.local(self._weights)
        self.count = self._total(share * self.positions)
        self._factor = 1.0 / ops.where(self.count > 0, self.count, 1.0)

    def _total(self, t: Any) -> Any:
        return t if self._reduce is None else self._reduce(t)

    def local(self, t: Any) -> Any:
        """Return the means over all values of this replica."""
        for axis in reversed(self._axes):
            t = _mean(t, axis)
        return t

    def shared(self, means: Any) -> Any:
        """Turn means over all values of this replica, zero where they do not count, into averages."""
        return means if self._factor is None else self._total(means * self.positions) * self._factor

    def of(self, t: Any) -> Any:
        """Return the averages of t."""
        return self.shared(self.local(t if self._weights is None else t * self._weights))


def _mean(t: Any, axis: int) -> Any:
    """Return the means over one axis, and 0 if its length is 0."""
    shape = list(ops.shape(t))
    length = shape[axis]
    if isinstance(length, int):
        divisor = max(length, 1)
        if length <= _LONG:
            return ops.sum(t, axis) / divisor
    else:
        divisor = ops.cast(ops.maximum(length, 1), t.dtype)
    blocks = length // _BLOCK
    whole, cut = (slice(None),) * axis, blocks * _BLOCK
    parts = ((*whole, slice(None, cut)), (*whole, slice(cut, None)))
    head, tail = (t[part] for part in parts)
    head = ops.sum(ops.reshape(head, [*shape[:axis], blocks, _BLOCK, *shape[axis + 1 :]]), axis + 1) / divisor
    return ops.sum(head, axis) + ops.sum(tail, axis) / divisor


def _sum_over_replicas() -> Callable[[Any], Any] | None:
    """Return the sum over the replicas of TensorFlow's distribution strategy, or None outside of one."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return lambda t: context.all_reduce(tf.distribute.ReduceOp.SUM, t)
