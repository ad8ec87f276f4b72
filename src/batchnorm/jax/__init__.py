"""Batch normalization for JAX: functions, and layers for Flax in `batchnorm.jax.nnx` and `batchnorm.jax.linen`.

- `function`: the public functions; `checks`, their arguments.
- `training`: the batch's statistics, with derivatives; made of the operators in `composition` by `primitives`.
- `kernels`: the operators on the CPU, by XLA's foreign function interface.
"""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand, required_by

if TYPE_CHECKING:
    from batchnorm.jax import linen as linen
    from batchnorm.jax import nnx as nnx

with required_by("batchnorm.jax"):
    from batchnorm.jax.function import batch_norm, normalize

__getattr__ = parts_on_demand(__name__, "linen", "nnx")

__all__ = ["batch_norm", "normalize"]
