"""The layer for Keras."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import ops

from batchnorm._options import (
    ON_NONFINITE,
    check_choice,
    check_eps,
    check_weight_of_old,
    nonfinite_batch,
    undecidable_error,
)
from batchnorm.keras import backends
from batchnorm.keras.activations import fused
from batchnorm.keras.backends.call import Call, Statistics
from batchnorm.keras.backends.composition import finite_where_masked, spread, wide

_ON_SINGLE = ("batch", "running")

# The checks of attributes, which may also be set after construction. Keras's layer accepts an epsilon of zero.
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "momentum": check_weight_of_old,
    "renorm_momentum": partial(check_weight_of_old, name="renorm_momentum"),
    "epsilon": partial(check_eps, zero_allowed=True, name="epsilon"),
    "on_nonfinite": lambda caller, value: check_choice(caller, "on_nonfinite", value, ON_NONFINITE),
    "on_single": lambda caller, value: check_choice(caller, "on_single", value, _ON_SINGLE),
}


@keras.saving.register_keras_serializable("batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization; a drop-in replacement for `keras.layers.BatchNormalization`.

    `y = f((x - μ)/√(σ² + epsilon)·gamma + beta)`, per channel. In training, μ and σ² (biased) are those of the batch,
    and the moving statistics are updated: `moving ← momentum·moving + (1 - momentum)·batch`, with the biased variance.
    Otherwise, and with `trainable=False`, μ and σ² are the moving statistics. Arguments, weights and their order,
    automatic names and weight files are those of Keras's layer.

    Args:
        *args: Arguments of Keras's layer, in its order.
        activation: f: a function or a name of `keras.activations`, or None. The torch and JAX backends fuse common ones
            with the normalization.
        on_nonfinite: What training does if the batch's mean or variance is not finite, as after an overflow in float16:
            "propagate"; "skip" to leave the moving statistics unchanged; or "error" to raise FloatingPointError and
            change nothing, which on JAX and TensorFlow needs `model.compile(..., run_eagerly=True)`.
        on_single: How to normalize a training batch with one value per channel (with a mask, at most one that counts):
            "batch", by its own variance of 0, as in Keras's layer, so that y is f(beta); or "running", by the moving
            statistics, which then stay unchanged.
        synchronized: Whether the statistics are those of all devices: on torch, the processes of the default process
            group; on JAX, the devices of Keras's distribution; on TensorFlow, the replicas of the strategy.
        **kwargs: Keyword arguments of Keras's layer, such as `axis`, `momentum` (the weight of the *old* average),
            `epsilon`, `center`, `scale`, `renorm`, `dtype` and `name`.

    Shape:
        inputs and outputs: any, with the channels in `axis`. mask: inputs' shape without its last axis, or
        broadcastable to that, also if `axis` is not the last; True where a value counts. At least two dimensions.

    Raises:
        TypeError: momentum or epsilon is not a number.
        ValueError: on_nonfinite, on_single, activation or another argument is invalid, now or when it is set later;
            synchronized=True on a backend that cannot synchronize; when called, the mask's rank is wrong, or inputs do
            not have the channels that the layer was built with; a compiled step trains a layer with
            on_nonfinite="error".
        FloatingPointError: in training with on_nonfinite="error", the batch's mean or variance is not finite.

    Numerics:
        Statistics are computed in float32 (float64 for float64 inputs) from deviations from the mean, so that a mean of
        1e6 standard deviations costs no accuracy in training. A batch in which no value counts (an empty batch, or a
        mask without a true value) changes no moving statistic; Keras's layer makes them NaN or moves them to zero. A
        position that does not count may be NaN or infinite, and is then treated as 0.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; for `renorm`, Ioffe 2017.

    Examples:
        >>> import numpy as np
        >>> layer = BatchNormalization(momentum=0.9, activation="relu")
        >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]), training=True)
        >>> keras.ops.convert_to_numpy(y).round(2).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
        >>> keras.ops.convert_to_numpy(layer.moving_mean).round(2)
        array([0.2, 2. ], dtype=float32)
    """

    def __init__(
        self,
        *args: Any,
        activation: Any = None,
        on_nonfinite: str = "propagate",
        on_single: str = "batch",
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        if synchronized:
            backends.current().check_synchronized()
        super().__init__(*args, **kwargs)
        self.activation = keras.activations.get(activation)
        self.on_nonfinite = on_nonfinite
        self.on_single = on_single
        self.synchronized = synchronized  # not through Keras's layer, which refuses it on all backends but TensorFlow

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, after checking its value as the constructor does."""
        if name in _CHECKS:
            _CHECKS[name]("BatchNormalization", value)
        super().__setattr__(name, value)

    def build(self, input_shape: Any) -> None:
        """Create the weights, in the order of Keras's layer."""
        if len(input_shape) < 2:
            raise ValueError(
                f"BatchNormalization expects inputs of at least two dimensions, got the shape {tuple(input_shape)}. "
                "Add an axis for the samples."
            )
        if not -len(input_shape) <= self.axis < len(input_shape):
            raise ValueError(
                f"BatchNormalization expects axis to be one of inputs of shape {tuple(input_shape)}, got {self.axis}. "
                "Pass the axis of the channels."
            )
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Return the config of Keras's layer, with this layer's own arguments that differ from their defaults."""
        config: dict[str, Any] = super().get_config()
        if self.activation is not keras.activations.linear:
            config["activation"] = keras.activations.serialize(self.activation)
        if self.on_nonfinite != "propagate":
            config["on_nonfinite"] = self.on_nonfinite
        if self.on_single != "batch":
            config["on_single"] = self.on_single
        return config

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Return y of inputs' shape, in the layer's compute dtype."""
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            raise ValueError(  # with the words of Keras's layer, which its own tests expect
                "The mask provided should be one dimension less than the inputs (BatchNormalization expects a mask "
                f"that broadcasts to {tuple(inputs.shape[:-1])}), got one of shape {tuple(mask.shape)} for inputs of "
                f"shape {tuple(inputs.shape)}. Leave out the last axis of the inputs."
            )
        if mask is not None and not all(map(_broadcasts, mask.shape, inputs.shape)):
            raise ValueError(
                f"BatchNormalization expects a mask that broadcasts to {tuple(inputs.shape[:-1])}, got one of shape "
                f"{tuple(mask.shape)}. Each size must be 1 or that of the inputs."
            )
        renorm = getattr(self, "renorm", False)  # Keras before 3.13 has none
        trains = training and self.trainable
        backend = backends.current()
        operation = fused(self.activation) if backend.FUSES and not (trains and renorm) else None
        x = inputs if "float" in keras.backend.standardize_dtype(inputs.dtype) else wide(inputs)
        call = Call(self.axis % len(x.shape), self.epsilon, *(operation or ("none", 0.0)), self.synchronized, self.path)
        gamma = self.gamma if self.scale else None
        beta = self.beta if self.center else None
        by_moving = partial(
            backend.normalize, mean=self.moving_mean, variance=self.moving_variance, gamma=gamma, beta=beta, call=call
        )
        if not trains:
            y = by_moving(x)
        else:
            counts = None if mask is None else ops.expand_dims(ops.cast(mask, "bool"), -1)
            y, statistics = backend.batch_norm(*((wide(x), None, None) if renorm else (x, gamma, beta)), counts, call)
            if renorm:
                y = self._renormalize(y, statistics, call)
            if self.on_single == "running":
                finite = x if counts is None else finite_where_masked(x, counts)
                y, statistics = _where_single(y, statistics, partial(by_moving, finite), call)
            (self._update_renorm if renorm else self._update)(statistics)
        if operation is None:
            y = self.activation(y)
        return ops.cast(y, self.compute_dtype)

    def _renormalize(self, x_hat: Any, statistics: Statistics, call: Call) -> Any:
        """Return `(x̂·r + d)·gamma + beta`. Keras's layer computes r and d."""
        dtype = statistics.mean.dtype
        gamma = ops.cast(self.gamma, dtype) if self.scale else None
        beta = ops.cast(self.beta, dtype) if self.center else None
        r, d, _, _ = self._renorm_correction_and_moments(statistics.mean, statistics.variance)
        scale, shift = self._compose_transforms(r, d, gamma, beta, dtype)
        return x_hat * spread(scale, x_hat, call.axis) + spread(shift, x_hat, call.axis)

    def _update(self, statistics: Statistics) -> None:
        """Update the moving statistics."""
        mean, variance, _ = statistics
        self._assign(
            statistics,
            (self.moving_mean, _blend(self.moving_mean, mean, self.momentum)),
            (self.moving_variance, _blend(self.moving_variance, variance, self.momentum)),
        )

    def _update_renorm(self, statistics: Statistics) -> None:
        """Update moving and renormalization statistics. The moving variance is computed from the moving deviation."""
        mean = statistics.mean
        deviation = ops.sqrt(statistics.variance + self.epsilon)
        moving_deviation = _blend(self.moving_stddev, deviation, self.momentum)
        self._assign(
            statistics,
            (self.renorm_mean, _blend(self.renorm_mean, mean, self.renorm_momentum)),
            (self.renorm_stddev, _blend(self.renorm_stddev, deviation, self.renorm_momentum)),
            (self.moving_mean, _blend(self.moving_mean, mean, self.momentum)),
            (self.moving_stddev, moving_deviation),
            (self.moving_variance, ops.relu(ops.square(moving_deviation) - self.epsilon)),
        )

    def _assign(self, statistics: Statistics, *updates: tuple[Any, Any]) -> None:
        """Give the variables their new values, unless the batch does not count."""
        mean, variance, count = statistics
        counted = count > 0
        if counted is False:
            return
        if self.on_nonfinite == "error":
            _check_finite(mean, variance)
        elif self.on_nonfinite == "skip":
            finite = ops.all(ops.logical_and(ops.isfinite(mean), ops.isfinite(variance)))
            counted = finite if counted is True else ops.logical_and(counted, finite)
        for variable, new in updates:
            variable.assign(new if counted is True else ops.where(counted, new, ops.cast(variable, new.dtype)))


def _check_finite(mean: Any, variance: Any) -> None:
    """Raise an error if the statistics of a batch are not finite."""
    of_mean = ops.isfinite(mean)
    finite = ops.logical_and(of_mean, ops.isfinite(variance))
    try:
        all_finite = bool(ops.all(finite))
    except (TypeError, RuntimeError) as error:  # symbolic values
        hint = "Use one of them, or model.compile(..., run_eagerly=True)."
        raise ValueError(undecidable_error("BatchNormalization", "a compiled training step", hint)) from error
    if not all_finite:
        overflow = bool(ops.all(ops.logical_or(of_mean, finite)))
        channels = ops.convert_to_numpy(finite).tolist()
        raise FloatingPointError(nonfinite_batch("BatchNormalization", channels, overflow=overflow))


def _where_single(y: Any, statistics: Statistics, by_moving: Callable[[], Any], call: Call) -> tuple[Any, Statistics]:
    """Where at most one value of a channel counts, normalize it by the moving statistics and set its count to 0."""
    single = statistics.count <= 1
    if single is False:
        return y, statistics
    if single is True:
        return by_moving(), statistics._replace(count=0)
    count = ops.where(single, ops.zeros_like(statistics.count), statistics.count)
    where = spread(single, y, call.axis) if len(single.shape) else single
    return ops.where(where, ops.cast(by_moving(), y.dtype), y), statistics._replace(count=count)


def _broadcasts(size: int | None, wanted: int | None) -> bool:
    return size in (None, 1, wanted) or wanted is None


def _blend(variable: Any, new: Any, momentum: float) -> Any:
    """Return the moving average after one more batch."""
    return ops.cast(variable, new.dtype) * momentum + new * (1.0 - momentum)
