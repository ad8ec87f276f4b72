"""Batch normalization as a layer for Flax Linen."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from batchnorm._frameworks import required_by
from batchnorm.jax.checks import checked_axis
from batchnorm.jax.layers import CALLER, Running, evaluate, options_of, step

with required_by("batchnorm.jax.linen"):
    from flax import linen
    from flax.linen import dtypes

__all__ = ["BatchNorm"]


class BatchNorm(linen.BatchNorm):
    """`flax.linen.BatchNorm` that keeps full precision, with a fused activation and residual.

    The attributes, the tree of variables and the convention of `momentum` (the weight of the *old* statistics) are
    those of the stock layer, so that checkpoints load in both directions. The running variance is biased.

    Differences from the stock layer: statistics keep full precision at a large mean, and `use_fast_variance` has no
    effect. If nothing counts (an empty batch, or a mask without a true value), the running statistics do not change.
    One value per channel is an error in training (see `on_single`), except during initialization. Masked positions may
    hold NaN.

    Attributes:
        activation: The name of the activation after the normalization, as for `batchnorm.jax.batch_norm`.
        negative_slope: Slope of "leaky_relu" below zero.
        alpha: α of "elu".
        on_nonfinite: What training does if the mean or variance of a batch is not finite: "propagate"; "skip" to leave
            the running statistics unchanged; or "error" to raise FloatingPointError, which in traced code, as in
            `jax.jit`, needs `jax.experimental.checkify`.
        on_single: "error", or "running" to normalize a training batch with one value per channel (with a mask: at most
            one that counts), over all devices, by the running statistics, and leave them unchanged.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchNorm(use_running_average=False, activation="relu", momentum=0.5)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updated = layer.apply(variables, x, mutable=["batch_stats"])
        >>> y.round(4).tolist(), updated["batch_stats"]["mean"].tolist()
        ([[0.0, 0.0], [1.0, 1.0]], [1.0, 10.0])
    """

    activation: str = "none"
    negative_slope: float = 0.01
    alpha: float = 1.0
    on_nonfinite: str = "propagate"
    on_single: str = "error"

    @linen.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Return y, and in training update the collection "batch_stats".

        Args:
            x: The channels are along `axis`.
            use_running_average: Whether to normalize by the running statistics, if the attribute is None.
            mask: The positions that count in the statistics: booleans or weights that broadcast to x's shape.
            residual: Of x's shape; added before the activation.

        Raises:
            TypeError: as for `batchnorm.jax.batch_norm`.
            ValueError: as for `batchnorm.jax.batch_norm`; an attribute is invalid; or use_running_average is given in
                neither place, or in both.
        """
        use_running_average = linen.merge_param("use_running_average", self.use_running_average, use_running_average)
        options = options_of(self)
        x = jnp.asarray(x)
        shape = (x.shape[checked_axis(CALLER, x, options.axis)],)
        kept = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kept)
        var = self.variable("batch_stats", "var", jnp.ones, shape, kept)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        running = Running(mean.value, var.value)
        if use_running_average:
            return evaluate(x, running, scale, bias, residual, options).astype(dtype)
        initializing = self.is_initializing()
        y, updated = step(x, running, scale, bias, residual, mask, options, initializing=initializing)
        if not initializing:
            mean.value, var.value = updated
        return y.astype(dtype)
