"""Hooks that leave nothing behind, and the facts about a module that they need."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.parameter import is_lazy

from batchnorm.doctor.measure.layers import Array
from batchnorm.walk import is_frozen


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network without the wrappers that compile it or run it on several devices."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of the module run compiled code, which ignores new hooks."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def has_one_batch(module: nn.Module) -> bool:
    """Return whether the layer normalizes all samples by one set of batch statistics."""
    mean = getattr(module, "running_mean", None)
    return not is_frozen(module) and not (isinstance(mean, Tensor) and mean.dim() > 1)


def vector(held: object) -> Tensor | None:
    """Return a parameter or buffer if it is a tensor with values, else None."""
    return held if isinstance(held, Tensor) and not is_lazy(held) and held.numel() else None


def plain(vector: Array | None) -> Array | None:
    """Return the vector, or None if it has a row for each domain."""
    return vector if vector is not None and vector.ndim == 1 else None


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that does not keep the watch alive, and that compiled code leaves out."""
    reference = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        bound = reference()
        if bound is not None:
            bound(*args)

    return hook


def remove(*handles: list[Any]) -> None:
    """Remove hooks of modules and optimizers, and empty the lists."""
    for some in handles:
        while some:
            handle = some.pop()
            handle.remove()
            modules._global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch does not remove it


def user_stacklevel() -> int:
    """Return the `stacklevel` for `warnings.warn` in the caller: the first frame outside this library and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("batchnorm", "torch"):
        frame, level = frame.f_back, level + 1
    return level
