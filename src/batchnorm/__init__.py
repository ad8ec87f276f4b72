"""Batch normalization for PyTorch: exact layers, and tools to check, recalibrate, convert and fold them."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from batchnorm import functional, nn
from batchnorm.moments import Moments
from batchnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchRenorm,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    ConditionalBatchNorm,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    DecorrelatedBatchNorm,
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    DomainBatchNorm,
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    DomainBatchNorm3d,
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenBatchNormAct1d,
    FrozenBatchNormAct2d,
    FrozenBatchNormAct3d,
    GhostBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    PaperSchedule,
    SyncBatchNorm,
    keep_domain,
    microbatch_momentum,
    momentum_per_microbatch,
    update_running_stats,
    use_domain,
)
from batchnorm.ops import backends
from batchnorm.recalibrate import recalibrate
from batchnorm.standardize import Standardizer
from batchnorm.surgery import (
    accelerate,
    convert,
    drop_redundant_bias,
    fold,
    fold_onnx,
    insert_batchnorm,
    parameter_groups,
    unfreeze,
)
from batchnorm.surgery.convert import freeze

if _TYPE_CHECKING:
    from batchnorm.doctor import diagnose, watch

__version__ = _version("batchnorm")

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "ConditionalBatchNorm",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "DecorrelatedBatchNorm",
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "DomainBatchNorm",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "FrozenBatchNormAct1d",
    "FrozenBatchNormAct2d",
    "FrozenBatchNormAct3d",
    "GhostBatchNorm",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "PaperSchedule",
    "Standardizer",
    "SyncBatchNorm",
    "__version__",
    "accelerate",
    "backends",
    "convert",
    "diagnose",
    "drop_redundant_bias",
    "fold",
    "fold_onnx",
    "freeze",
    "functional",
    "insert_batchnorm",
    "keep_domain",
    "microbatch_momentum",
    "momentum_per_microbatch",
    "nn",
    "parameter_groups",
    "recalibrate",
    "unfreeze",
    "update_running_stats",
    "use_domain",
    "watch",
]


def __getattr__(name: str) -> _Any:
    """Import the doctor when it is first used: `import batchnorm` stays small."""
    if name in ("diagnose", "doctor", "watch"):
        doctor = _import_module("batchnorm.doctor")
        return doctor if name == "doctor" else getattr(doctor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
