"""Memory of BN + ReLU: the memory that autograd keeps for backward, and the peak of a training step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Table
from benchmarks.subjects.cases import shape_text

KEY = ("what", "contender")
SHAPE, QUICK_SHAPE = (32, 256, 56, 56), (32, 256, 28, 28)


def _contenders(what: str, channels: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    add = "add" in what
    activation = "silu" if "SiLU" in what else "relu"
    ours = batchnorm.BatchNormAct2d(channels, activation=activation)
    theirs = nn.BatchNorm2d(channels)
    function = getattr(nn.functional, activation)
    return {
        "batchnorm": (lambda x, r: ours(x, r)) if add else (lambda x, r: ours(x)),
        "torch": (lambda x, r: function(theirs(x) + r)) if add else (lambda x, r: function(theirs(x))),
        "torch inplace": (
            (lambda x, r: function(theirs(x).add_(r), inplace=True))
            if add
            else (lambda x, r: function(theirs(x), inplace=True))
        ),
    }


def kept(forward: Callable[[], Tensor]) -> int:
    """Return the number of bytes that autograd keeps for backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    del y
    return sum(storages.values())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status must have {field}")


def peak(call: Callable[[], Any]) -> float:
    """Return the largest growth of resident memory during a call in bytes; NaN except on Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # resets the peak to the resident memory now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def measure_memory(options: Options, table: Table) -> None:
    """Write kept bytes and peak, in tensors of x's size; the peak excludes x and dy, which exist before."""
    shape = QUICK_SHAPE if options.quick else SHAPE
    done = table.measured()
    x, r, dy = (torch.randn(shape) for _ in range(3))
    x.requires_grad_()
    r.requires_grad_()
    nbytes = x.numel() * x.element_size()
    for what in ("BN+ReLU", "BN+add+ReLU", "BN+SiLU"):
        for name, forward in _contenders(what, shape[1]).items():
            if (what, name) in done:
                continue

            def step(forward: Callable[[Tensor, Tensor], Tensor] = forward) -> None:
                y = forward(x, r)
                torch.autograd.grad(y, (x, r) if "add" in what else (x,), dy)  # noqa: B023

            kept_bytes = kept(lambda forward=forward: forward(x, r))
            row = {"what": what, "contender": name, "shape": shape_text(shape), "bytes": nbytes}
            row |= {"kept_bytes": kept_bytes, "kept_tensors": kept_bytes / nbytes, "peak_tensors": peak(step) / nbytes}
            table.append([row])
    print("memory measured", flush=True)
