"""Batch normalization for PyTorch: exact layers, and what they need around them."""

from importlib.metadata import version as _version

from batchnorm import functional, nn
from batchnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    update_running_stats,
)
from batchnorm.ops import backends

__version__ = _version("batchnorm")

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "__version__",
    "backends",
    "functional",
    "nn",
    "update_running_stats",
]
