"""The operators of batch normalization: schemas, shapes, derivatives, and the eager implementation.

Every operator is `torch.ops.batchnorm.<name>`. These functions choose how derivatives are computed:
`batch_statistics_norm`, its two halves `batch_moments` and `batch_statistics_norm_by_parts`, both halves in one call
(`batch_statistics_norm_and_moments`), and `fixed_statistics_norm`. Other packages call these functions or the
operators, never an implementation.
"""

from batchnorm._frameworks import required_by

with required_by("batchnorm.ops"):
    from batchnorm.ops import compiled, registration  # noqa: F401  (register the operators)
    from batchnorm.ops.activations import ACTIVATIONS, called_activation, module_activation, parameter_of
    from batchnorm.ops.parts import BatchStatistics
    from batchnorm.ops.renorm import renorm_correction
    from batchnorm.ops.routes import (
        batch_moments,
        batch_statistics_norm,
        batch_statistics_norm_and_moments,
        batch_statistics_norm_and_update_,
        batch_statistics_norm_by_parts,
        fixed_statistics_norm,
        running_where_single,
        update_running_,
        update_running_by_parts_,
    )

__all__ = [
    "ACTIVATIONS",
    "BatchStatistics",
    "batch_moments",
    "batch_statistics_norm",
    "batch_statistics_norm_and_moments",
    "batch_statistics_norm_and_update_",
    "batch_statistics_norm_by_parts",
    "called_activation",
    "fixed_statistics_norm",
    "module_activation",
    "parameter_of",
    "renorm_correction",
    "running_where_single",
    "update_running_",
    "update_running_by_parts_",
]
