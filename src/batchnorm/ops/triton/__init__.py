"""The operators on CUDA devices by Triton kernels, which are imported when the first CUDA tensor arrives.

The eager implementation is used for float64, empty tensors, running statistics that are not contiguous, devices that
cannot run the kernels, and calls that need a variant of a kernel that does not compile or start.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops.eager import values_per_channel
from batchnorm.ops.schemas import SIGNATURES
from batchnorm.ops.triton import support

OPERATORS = tuple(name for name in SIGNATURES if name != "copy_running")

_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def implementation(name: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator `name` for CUDA tensors: the kernels, or `eager` if they cannot be used."""
    return _on_cuda(name, SIGNATURES[name].arguments, eager)


def fused(train_forward: Callable[..., Any], update_running_: Callable[..., Any]) -> Callable[..., Any]:
    """Return both operators at once, for a constant momentum and statistics that may be non-finite.

    Its arguments are those of `train_forward`, running_mean, running_var, num_batches_tracked, momentum.
    """
    arguments = SIGNATURES["train_forward"].arguments
    number = len(arguments)

    def separately(*args: Any) -> Any:
        found = train_forward(*args[:number])
        *running, momentum = args[number:]
        update_running_(*running, *found[1:], values_per_channel(args[0]), None, momentum, False)
        return found

    names = (*arguments, *SIGNATURES["update_running_"].arguments[:3], "momentum")
    return _on_cuda("train_forward_and_update_", names, separately)


def start(name: str, key: bytes, tensors: tuple[Tensor | None, ...], *others: Any) -> bool:
    """Prepare and start the launches of a layer's pass, for the node in C++.

    Args:
        name: The function of `passes.py`.
        key: The bytes that identify the launches: all arguments, without the addresses of tensors.
        tensors: The pass's tensors.
        others: Its other arguments.

    Returns:
        Whether all of the launches started.
    """
    try:
        found = _replay().start(name, tensors, others)
    except support.UnusableVariantError as error:
        unusable = error.variant, error.cause
    else:
        if len(_replays) >= _MOST_REPLAYS:
            _replays.clear()
        if found is not None:
            _replays[key] = found
        return True
    support.give_up(name, *unusable)
    return False


def start_again(key: bytes, pointers: tuple[int | None, ...]) -> bool:
    """Start the launches of an earlier call with this key for tensors at other addresses; return whether it did."""
    found = _replays.get(key)
    return found is not None and found.start(pointers)


# A limit, because a program may call a layer with ever new sizes.
_MOST_REPLAYS = 4096
_replays: dict[bytes, Any] = {}


def serves(x: Tensor) -> bool:
    """Return whether the kernels can be used for x."""
    return x.is_cuda and support.problem(x.device) is None


@functools.cache
def _replay() -> Any:
    return importlib.import_module("batchnorm.ops.triton.replay")


def _on_cuda(name: str, arguments: tuple[str, ...], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    updated = arguments.index("running_mean") if "running_mean" in arguments else None
    at = arguments.index("x") if "x" in arguments else 0  # of x, or else of the running mean

    def on_cuda(*args: Any) -> Any:
        tensor = args[at]
        if tensor.dtype not in _DTYPES or tensor.numel() == 0 or support.problem(tensor.device) is not None:
            return otherwise(*args)
        if updated is not None and not _writable(*args[updated : updated + 3]):
            return otherwise(*args)
        device = tensor.get_device()
        for t in args:
            if isinstance(t, Tensor) and (t.get_device() != device or not t.data_ptr()):
                _checks.check_allocated(f"batchnorm::{name}", **dict(zip(arguments, args, strict=False)))
                if t.numel():
                    return otherwise(*args)  # which accepts a scalar on the CPU, and reports other mixtures of devices
        try:
            return _launcher(name)(*args)
        except support.UnusableVariantError as error:
            unusable = error.variant, error.cause
        support.give_up(name, *unusable)
        return otherwise(*args)

    return on_cuda


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] = getattr(importlib.import_module("batchnorm.ops.triton.launch"), name)
    return launcher


def _writable(running_mean: Tensor, running_var: Tensor, tracked: Tensor | None) -> bool:
    plain = running_mean.is_contiguous() and running_var.is_contiguous()
    return plain and (tracked is None or tracked.dtype == torch.int64)
