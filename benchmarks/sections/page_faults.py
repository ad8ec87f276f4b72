"""The cost of new memory: time and page faults of ReLU and of BN + ReLU under different allocators."""

from __future__ import annotations

import ctypes.util
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import batchnorm
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import ALLOCATORS, RESERVED, Table
from benchmarks.measuring.timing import alternate
from benchmarks.subjects.cases import shape_text

KEY = ("allocator", "what")
SHAPE, QUICK_SHAPE = (32, 256, 56, 56), (8, 256, 28, 28)


def _preload(name: str, **environment: str) -> dict[str, str] | None:
    """Return an environment that preloads an allocator's library, or None if it is not installed."""
    found = ctypes.util.find_library(name)
    return None if found is None else {"LD_PRELOAD": found, **environment}


def settings() -> dict[str, dict[str, str] | None]:
    """Return the environment of each setting; None for a setting that this machine does not have."""
    keep = "oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"
    return {
        **ALLOCATORS,
        RESERVED: {},
        "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
        "kept + huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
        "jemalloc": _preload("jemalloc", MALLOC_CONF=keep),
        "tcmalloc": _preload("tcmalloc_minimal"),
    }


def _faults(call: Callable[[], object], times: int = 3) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times


def measure_page_faults(options: Options, table: Table) -> None:
    """Write time and page faults of each call, for the setting of this process."""
    if any(setting == options.allocator for setting, _ in table.measured()):
        return
    name = {"jemalloc": "jemalloc", "tcmalloc": "tcmalloc"}.get(options.allocator)
    if name is not None and name not in Path("/proc/self/maps").read_text():
        raise RuntimeError(f"{name} must be loaded for this setting, but is not: run the section without --here")
    shape = QUICK_SHAPE if options.quick else SHAPE
    x, dy = torch.randn(shape), torch.randn(shape)
    wide = x.clone().requires_grad_()
    ours, theirs = batchnorm.BatchNormAct2d(shape[1]), torch.nn.BatchNorm2d(shape[1])
    out = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "ReLU into memory that is there": lambda: torch.clamp_min(x, 0, out=out),
        "ReLU": lambda: F.relu(x),
        "BN+ReLU forward+backward, torch": lambda: torch.autograd.grad(F.relu(theirs(wide)), wide, dy),
        "BN+ReLU forward+backward, batchnorm": lambda: torch.autograd.grad(ours(wide), wide, dy),
    }
    times = alternate(calls, 4 * options.seconds, least=2 if options.quick else 5)
    rows = []
    for what, call in calls.items():
        row = {"allocator": options.allocator, "what": what, "shape": shape_text(shape), "threads": options.threads}
        row |= {"bytes": x.numel() * x.element_size()}
        row |= {f"p{p}_ms": times[what].percentile(p) * 1e3 for p in (20, 50, 80)} | {"page_faults": _faults(call)}
        rows.append(row)
    table.append(rows)
    print(f"page faults measured: {options.allocator}", flush=True)
