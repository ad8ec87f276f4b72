"""Batch normalization for PyTorch, Keras and JAX: exact layers, and tools to check, recalibrate, convert and fold them.

Importing this package loads no framework. Each name is imported when it is first used.
"""

from batchnorm._version import __version__

TYPE_CHECKING = False  # type checkers read it as true; typing's own would take longer to import than this package
if TYPE_CHECKING:
    from batchnorm import compare as compare
    from batchnorm import doctor as doctor
    from batchnorm import functional as functional
    from batchnorm import integrations as integrations
    from batchnorm import jax as jax
    from batchnorm import keras as keras
    from batchnorm import memory as memory
    from batchnorm import models as models
    from batchnorm import moments as moments
    from batchnorm import nn as nn
    from batchnorm import ops as ops
    from batchnorm import recalibration as recalibration
    from batchnorm import reference as reference
    from batchnorm import standardize as standardize
    from batchnorm import state as state
    from batchnorm import surgery as surgery
    from batchnorm._backends import backends
    from batchnorm.doctor.pytorch.diagnosing import diagnose
    from batchnorm.doctor.watching import watch
    from batchnorm.memory import keep_memory
    from batchnorm.moments import Moments
    from batchnorm.nn import *
    from batchnorm.recalibration import recalibrate
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
    from batchnorm.surgery.prune import prune_channels

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
    "join",
    "keep_domain",
    "keep_memory",
    "microbatch_momentum",
    "momentum_per_microbatch",
    "nn",
    "parameter_groups",
    "prune_channels",
    "recalibrate",
    "unfreeze",
    "update_running_stats",
    "use_domain",
    "watch",
]

# Modules that are reachable without an import of their own. Star imports bind those in `__all__`.
_MODULES = (
    "compare",
    "doctor",
    "functional",
    "integrations",
    "jax",
    "keras",
    "memory",
    "models",
    "moments",
    "nn",
    "ops",
    "recalibration",
    "reference",
    "standardize",
    "state",
    "surgery",
)
# The framework of each name that does not need PyTorch; None if it needs no framework.
_FRAMEWORKS = {
    "__version__": None,
    "backends": None,
    "jax": "jax",
    "keep_memory": None,
    "keras": "keras",
    "memory": None,
    "models": None,
    "reference": None,
    "state": None,
}

# The module of each name; every other name is in `batchnorm.nn`.
_HOMES = {
    "Moments": "moments",
    "Standardizer": "standardize",
    "accelerate": "surgery",
    "backends": "_backends",
    "convert": "surgery",
    "diagnose": "doctor",
    "drop_redundant_bias": "surgery",
    "fold": "surgery",
    "fold_onnx": "surgery",
    "freeze": "surgery",
    "insert_batchnorm": "surgery",
    "keep_memory": "memory",
    "parameter_groups": "surgery",
    "prune_channels": "surgery.prune",
    "recalibrate": "recalibration",
    "unfreeze": "surgery",
    "watch": "doctor",
}

if not TYPE_CHECKING:  # type checkers would accept every name

    def __getattr__(name: str) -> object:
        """Import a name when it is first used."""
        if name not in _MODULES and name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from batchnorm._frameworks import required_by

        with required_by(f"{__name__}.{name}"):
            if name in _MODULES:
                return import_module(f"{__name__}.{name}")
            home = import_module(f"{__name__}.{_HOMES.get(name, 'nn')}")
            globals()[name] = value = getattr(home, name)
        return value


def __dir__() -> list[str]:
    """List the public names. Those whose framework is not installed are left out."""
    from batchnorm._frameworks import is_installed

    def available(name: str) -> bool:
        framework = _FRAMEWORKS.get(name, "torch")
        return framework is None or is_installed(framework)

    return sorted(filter(available, {*_MODULES, *__all__}))
