"""Batch normalization as a layer for Flax NNX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from batchnorm._frameworks import required_by
from batchnorm.jax.layers import CALLER, Running, evaluate, options_of, step

with required_by("batchnorm.jax.nnx"):
    from flax import nnx
    from flax.nnx.nn import dtypes

__all__ = ["BatchNorm"]


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` that keeps full precision, with a fused activation and residual.

    The arguments, parameters, statistics and the convention of `momentum` (the weight of the *old* statistics) are
    those of the stock layer, so that checkpoints load in both directions. The running variance is biased.

    Differences from the stock layer: statistics keep full precision at a large mean, also if `dtype` is shorter than
    x's dtype, because x is not rounded before them. `use_fast_variance` has no effect. If nothing counts (an empty
    batch, or a mask without a true value), the running statistics do not change. One value per channel is an error in
    training (see `on_single`). Masked positions may hold NaN.

    Args:
        num_features: The number of channels.
        activation: The name of the activation after the normalization, as for `batchnorm.jax.batch_norm`.
        negative_slope: Slope of "leaky_relu" below zero.
        alpha: α of "elu".
        on_nonfinite: What training does if the mean or variance of a batch is not finite: "propagate"; "skip" to leave
            the running statistics unchanged; or "error" to raise FloatingPointError, which in traced code, as in
            `jax.jit`, needs `jax.experimental.checkify`.
        on_single: "error", or "running" to normalize a training batch with one value per channel (with a mask: at most
            one that counts), over all devices, by the running statistics, and leave them unchanged.
        **stock: The other arguments of `flax.nnx.BatchNorm`, such as `momentum`, `epsilon`, `axis` (one axis),
            `axis_name`, `dtype` and `rngs`.

    Raises:
        ValueError: activation, on_nonfinite or on_single is unknown, or axis has several axes.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = BatchNorm(2, activation="relu", momentum=0.5, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 10.0], [3.0, 30.0]])).round(4).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
        >>> layer.mean[...].tolist()
        [1.0, 10.0]
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: str = "none",
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        on_nonfinite: str = "propagate",
        on_single: str = "error",
        **stock: Any,
    ) -> None:
        super().__init__(num_features, **stock)
        self.activation = activation
        self.negative_slope = negative_slope
        self.alpha = alpha
        self.on_nonfinite = on_nonfinite
        self.on_single = on_single
        options_of(self)

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Return y, and in training update the running statistics.

        Args:
            x: The channels are along `axis`.
            use_running_average: Whether to normalize by the running statistics; None: the layer's own attribute.
            mask: The positions that count in the statistics: booleans or weights that broadcast to x's shape.
            residual: Of x's shape; added before the activation.

        Raises:
            TypeError: as for `batchnorm.jax.batch_norm`.
            ValueError: as for `batchnorm.jax.batch_norm`, or use_running_average is given in neither place.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                f"{CALLER} expects use_running_average in the constructor or in the call, got None in both. Pass False "
                "in training and True in evaluation."
            )
        options = options_of(self)
        running = Running(self.mean[...], self.var[...])
        scale, bias = (None if parameter is None else parameter[...] for parameter in (self.scale, self.bias))
        promote = getattr(self, "promote_dtype", dtypes.promote_dtype)  # older Flax has no such argument
        dtype = promote((x, *running, scale, bias), dtype=self.dtype)[0].dtype
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, dtype))  # x is not rounded before the statistics
        if use_running_average:
            return evaluate(x, running, scale, bias, residual, options).astype(dtype)
        y, updated = step(x, running, scale, bias, residual, mask, options)
        self.mean[...], self.var[...] = updated
        return y.astype(dtype)
