"""Batch normalization for JAX: functions, and layers for Flax in `batchnorm.jax.nnx` and `batchnorm.jax.linen`.

- `function`: the public functions; `checks`, their arguments.
- `training`: the batch's statistics, with derivatives; made of the operators in `composition` by `primitives`.
- `kernels`: the operators on the CPU, by XLA's foreign function interface.
"""

from batchnorm._frameworks import required_by

with required_by("batchnorm.jax"):
    from batchnorm.jax.function import batch_norm, normalize

__all__ = ["batch_norm", "normalize"]
