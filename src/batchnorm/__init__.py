"""Batch normalization for PyTorch: exact layers, and tools to check, recalibrate, convert and fold them."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from batchnorm import functional, nn
from batchnorm.moments import Moments
from batchnorm.nn import *  # noqa: F403  (the names in nn.__all__, which are added to ours below)
from batchnorm.ops import backends
from batchnorm.recalibrate import recalibrate
from batchnorm.standardize import Standardizer
from batchnorm.surgery import (
    accelerate,
    convert,
    drop_redundant_bias,
    fold,
    fold_onnx,
    freeze,
    insert_batchnorm,
    parameter_groups,
    unfreeze,
)

if _TYPE_CHECKING:
    from batchnorm.doctor import diagnose, watch
    from batchnorm.surgery.prune import prune_channels

__version__ = _version("batchnorm")

__all__ = [
    "Moments",
    "Standardizer",
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
    "nn",
    "parameter_groups",
    "prune_channels",
    "recalibrate",
    "unfreeze",
    "watch",
]
__all__ += nn.__all__


def __getattr__(name: str) -> _Any:
    """Import the doctor and pruning when they are first used, so that `import batchnorm` stays fast."""
    if name == "prune_channels":
        return _import_module("batchnorm.surgery.prune").prune_channels
    if name in ("diagnose", "doctor", "watch"):
        doctor = _import_module("batchnorm.doctor")
        return doctor if name == "doctor" else getattr(doctor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names that are imported when first used, too."""
    return sorted({*globals(), *__all__})
