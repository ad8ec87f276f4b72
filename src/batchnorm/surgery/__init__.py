"""Changes to a model that already exists: faster layers, another normalization, frozen statistics, or none left."""

from batchnorm.surgery.accelerate import AccelerateReport, accelerate
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import FoldError, FoldReport, fold
from batchnorm.surgery.fold_onnx import OnnxResult, fold_onnx
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.groups import parameter_groups
from batchnorm.surgery.insert import insert_batchnorm
from batchnorm.surgery.redundant_bias import drop_redundant_bias

__all__ = [
    "AccelerateReport",
    "FoldError",
    "FoldReport",
    "OnnxResult",
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
