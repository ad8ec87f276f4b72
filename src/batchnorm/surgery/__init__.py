"""Functions that change an existing model: faster or other layers, frozen statistics, or no batch normalization."""

from typing import TYPE_CHECKING

from batchnorm._frameworks import parts_on_demand, required_by

if TYPE_CHECKING:
    from batchnorm.surgery import prune as prune
    from batchnorm.surgery.fold.onnx import fold_onnx
    from batchnorm.surgery.groups import parameter_groups
    from batchnorm.surgery.insert import insert_batchnorm
    from batchnorm.surgery.redundant_bias import drop_redundant_bias

with required_by("batchnorm.surgery"):
    from batchnorm.surgery.accelerate.accelerate import AccelerateReport, accelerate
    from batchnorm.surgery.convert.convert import convert
    from batchnorm.surgery.convert.freeze import freeze, unfreeze
    from batchnorm.surgery.fold import FoldError, FoldReport, fold

# The functions above have the names of their modules, which would hide them if they were imported later.
__getattr__ = parts_on_demand(
    __name__,
    "prune",
    fold_onnx="fold.onnx",
    parameter_groups="groups",
    insert_batchnorm="insert",
    drop_redundant_bias="redundant_bias",
)

__all__ = [
    "AccelerateReport",
    "FoldError",
    "FoldReport",
    "accelerate",
    "convert",
    "drop_redundant_bias",
    "fold",
    "fold_onnx",
    "freeze",
    "insert_batchnorm",
    "parameter_groups",
    "unfreeze",
]
