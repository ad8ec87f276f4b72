"""Batch normalization for PyTorch: exact layers, and tools to check, recalibrate, convert and fold them."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from batchnorm import functional, nn
from batchnorm._version import __version__
from batchnorm.moments import Moments
from batchnorm.nn import *  # noqa: F403  (the names in nn.__all__, which are added to ours below)
from batchnorm.ops import backends
from batchnorm.recalibrate import recalibrate
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
    from batchnorm.standardize import Standardizer
    from batchnorm.surgery.prune import prune_channels

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


# Imported when first used, so that `import batchnorm` stays fast.
_LATE = {
    "Standardizer": "batchnorm.standardize",
    "diagnose": "batchnorm.doctor",
    "prune_channels": "batchnorm.surgery.prune",
    "watch": "batchnorm.doctor",
}


def __getattr__(name: str) -> _Any:
    """Import a name when it is first used."""
    if name in _LATE:
        return getattr(_import_module(_LATE[name]), name)
    if name == "doctor":
        return _import_module("batchnorm.doctor")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all names, including those that are imported when first used."""
    return sorted({*globals(), *__all__})
