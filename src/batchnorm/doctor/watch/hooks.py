"""Hooks that leave no trace, and what they have to know of a module."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.parameter import is_lazy

from batchnorm.nn.frozen import FrozenLayer


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within what compiles it or runs it on several devices."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether its calls run compiled code, in which hooks are not seen."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def has_one_batch(module: nn.Module) -> bool:
    """Whether it normalizes by the batch, and all samples by the same kind of statistics."""
    mean = getattr(module, "running_mean", None)
    return not isinstance(module, FrozenLayer) and not (isinstance(mean, Tensor) and mean.dim() > 1)


def vector(held: object) -> Tensor | None:
    """The parameter or buffer, where there is one with values."""
    return held if isinstance(held, Tensor) and not is_lazy(held) and held.numel() else None


def plain(vector: Tensor | None) -> Tensor | None:
    """None for the rows of layers that hold several vectors."""
    return vector if vector is not None and vector.dim() == 1 else None


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that does not keep the watch alive, and that compiled code leaves out."""
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
            modules._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch leaves there


def level_of_user() -> int:
    """For `warnings.warn` in the caller: the first frame that is neither this library's nor torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("batchnorm", "torch"):
        frame, level = frame.f_back, level + 1
    return level
