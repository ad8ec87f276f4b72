"""Functions that change an existing model: faster or other layers, frozen statistics, or no batch normalization."""

from typing import TYPE_CHECKING

from batchnorm._frameworks import modules_on_demand, required_by

if TYPE_CHECKING:
    from batchnorm.surgery import prune as prune

with required_by("batchnorm.surgery"):
    from batchnorm.surgery.accelerate.accelerate import AccelerateReport, accelerate
    from batchnorm.surgery.convert.convert import convert
    from batchnorm.surgery.convert.freeze import freeze, unfreeze
    from batchnorm.surgery.fold import FoldError, FoldReport, fold
    from batchnorm.surgery.fold.onnx import fold_onnx
    from batchnorm.surgery.groups import parameter_groups
    from batchnorm.surgery.insert import insert_batchnorm
    from batchnorm.surgery.redundant_bias import drop_redundant_bias

__getattr__ = modules_on_demand(__name__, "prune")

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
