"""Read the layers of a model of PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm import moments
from batchnorm.doctor.measure.layers import Array, Layer, Statistics, Vectors
from batchnorm.models.execution import observe
from batchnorm.reference.statistics import Moments
from batchnorm.walk import (
    Found,
    as_in_training,
    eps_of,
    has_own_forward,
    is_frozen,
    norm_layers,
    num_channels,
    uses_batch,
)

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_HALF = (torch.float16, torch.bfloat16)


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """Return every layer of batch normalization, with its role in training; its vectors are not read."""
    found = norm_layers(model)
    training = [each.module.training for each in found]
    with as_in_training(model):
        return tuple(replace(_layer(each), training=mode) for each, mode in zip(found, training, strict=True))


def _layer(found: Found) -> Layer:
    module = found.module
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    known = isinstance(mean, Tensor) and isinstance(var, Tensor) and not is_lazy(mean)
    prevents = _prevents_updates(module)
    tracked = getattr(module, "num_batches_tracked", None)
    return Layer(
        found.paths,
        type(module).__name__,
        num_channels(module) or 0,
        running=as_statistics(observe.running_statistics(module)) if known else None,
        updates_running=module.training and mean is not None and not prevents and not is_frozen(module),
        by_batch=uses_batch(module),
        keeps_statistics=mean is not None,
        whitens=getattr(module, "running_whitening", None) is not None,
        updates=None if tracked is None else int(tracked.sum()),
        frozen=is_frozen(module),
        not_updated_by=prevents,
        synchronized=is_synchronized(module),
        on_single=str(getattr(module, "on_single", "error")),
        own_forward=isinstance(module, _BatchNorm) and has_own_forward(module),
        resolution=torch.finfo(mean.dtype).eps if isinstance(mean, Tensor) and mean.dtype in _HALF else None,
        parameters=sum(p.numel() for p in module.parameters(recurse=False)),
        buffers=sum(b.numel() for b in module.buffers(recurse=False)),
        **settings_of(module),
    )


def settings_of(module: nn.Module, optimized: Collection[int] | None = None) -> dict[str, Any]:
    """Return the settings of a layer that may change during training, by the name of the field of `Layer`.

    Args:
        module: The layer.
        optimized: The ids of the parameters that the optimizer trains; None if it is unknown.
    """
    momentum = getattr(module, "momentum", None)
    affine = list(module.parameters(recurse=False))
    return {
        "eps": eps_of(module),
        "momentum": None if momentum is None else float(momentum),
        "affine": bool(affine),
        "trained": any(p.requires_grad and (optimized is None or id(p) in optimized) for p in affine),
    }


def optimized_by(optimizer: torch.optim.Optimizer | None) -> set[int] | None:
    """Return the ids of the parameters that the optimizer trains; None without one."""
    return None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}


def is_synchronized(module: nn.Module) -> bool:
    """Return whether the layer computes its batch statistics over several processes."""
    return isinstance(module, nn.SyncBatchNorm) or bool(getattr(module, "sync", False))


def _prevents_updates(module: nn.Module) -> str:
    """Return the setting that prevents updates of the running statistics; empty if none does."""
    if not getattr(module, "track_running_stats", True):
        return "track_running_stats=False"
    if getattr(module, "momentum", None) == 0:
        return "momentum=0"
    return "" if getattr(module, "update_running_stats", True) else "update_running_stats=False"


@torch.no_grad()
def vectors_of(module: nn.Module) -> Vectors:
    """Return copies of the parameters and statistics of a layer."""
    held = (getattr(module, name, None) for name in _VECTORS)
    return Vectors(*(as_array(v, copy=True) if isinstance(v, Tensor) and v.numel() else None for v in held))


def as_array(tensor: Tensor, *, copy: bool = False) -> Array:
    """Return a tensor as float64 in NumPy."""
    array: Array = tensor.detach().cpu().to(torch.float64, copy=copy).numpy()
    return array


def as_statistics(statistics: observe.Statistics) -> Statistics:
    """Return statistics in NumPy."""
    return Statistics(*map(as_array, statistics))


def as_moments(given: moments.Moments) -> Moments:
    """Return moments in NumPy."""
    squares = given.count if given.count_squares is None else given.count_squares
    return Moments(*map(as_array, (given.count, given.mean, given.m2, squares)))


def torch_statistics(statistics: Iterable[Array]) -> observe.Statistics:
    """Return statistics in PyTorch."""
    return observe.Statistics(*map(torch.from_numpy, statistics))
