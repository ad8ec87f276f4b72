"""Compile the kernels that the launches choose for a device, without the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from batchnorm.ops.triton import launch, tiling
from benchmarks.gpu.layers import EPS, Case
from benchmarks.subjects import cases

# Arguments with x's shape, by the name of the kernel's parameter. y is read where there is dy.
_READ, _WRITTEN = ("x_ptr", "residual_ptr", "dy_ptr"), ("dx_ptr", "dz_ptr")


@dataclass(frozen=True)
class Launch:
    """One launch: the compiled kernel, and what it is launched with.

    Attributes:
        name: The kernel's function, without `_kernel`.
        programs: The size of the grid.
        arguments: The value of each parameter of the function, compile-time constants included.
        warps: Warps of a program.
        kernel: Triton's compiled kernel; its `asm` holds the code.
    """

    name: str
    programs: int
    arguments: dict[str, Any]
    warps: int
    kernel: Any

    def tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the tensors of x's shape that the kernel reads, and those that it writes."""
        backward = "dy_ptr" in self.arguments
        read = (*_READ, "y_ptr") if backward else _READ
        written = _WRITTEN if backward else ("y_ptr",)
        given = ([self.arguments.get(name) for name in names] for names in (read, written))
        first, second = ([t for t in tensors if t is not None] for tensors in given)
        return first, second


# One for each architecture, because Triton keeps a device's kernels for the life of the process.
_DEVICES: dict[tuple[str, bool], int] = {}


class _Driver:
    """The part of a driver that the compiler uses."""

    def __init__(self, architecture: str, frontend: bool) -> None:
        self._target = target_of(architecture)
        self._device = _DEVICES.setdefault((architecture, frontend), len(_DEVICES))

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(architecture: str) -> GPUTarget:
    """Return Triton's target for an architecture such as `sm_90` or `gfx942`."""
    kind, _, number = architecture.partition("_")
    if kind == "sm":
        return GPUTarget("cuda", int(number), 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def _trace(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Any:
    """Translate a kernel into Triton's intermediate representation, the first step of `triton.compile`."""
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return source.make_ir(target, parsed, implementations, modules, context)


@contextlib.contextmanager
def launches(architecture: str, processors: int = 132, *, frontend: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches in the block; they compile, but nothing starts.

    Args:
        architecture: Such as `sm_90` or `gfx942`.
        processors: Multiprocessors of the device, which decide the number of programs.
        frontend: Whether to stop after Triton's front end, which accepts less of Python than the interpreter.

    Yields:
        The launches so far, in order. Tensors may be on any device, also on the meta device.
    """
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if target_of(architecture).backend != "cuda":
            options.pop("maxnreg", None)  # of CUDA only
        function.device_caches[driver.active.get_current_device()]  # sets `compile`, the first time on a device
        with mock.patch.object(function, "compile", _trace if frontend else triton.compiler.compile):
            kernel = run(function, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(function.arg_names, args, strict=False)) | options
        warps = arguments.pop("num_warps")
        found.append(Launch(function.__name__.removesuffix("_kernel"), grid[0], arguments, warps, kernel))

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", _Driver(architecture, frontend)),
        mock.patch.object(tiling, "multiprocessors", return_value=processors),
    ):
        yield found


def _running(channels: int) -> tuple[torch.Tensor, ...]:
    """Return running statistics and the number of batches."""
    mean, var = torch.empty(2, channels, device="meta").unbind()
    return mean, var, torch.empty((), dtype=torch.int64, device="meta")


def training_step(case: Case) -> None:
    """Make the launches of a training step of batch normalization and ReLU, within `launches`."""
    x, dy, residual = (empty(case.shape, case.layout, cases.DTYPES[case.dtype]) for _ in range(3))
    weight = torch.empty(case.shape[1], device="meta")
    attributes = (EPS, "relu", 0.0)
    inputs = (x, weight, weight, residual if case.residual else None, *attributes)
    y, *statistics = launch.train_forward_and_update_(*inputs, *_running(case.shape[1]), 0.1)
    kept = y if case.residual else None
    launch.train_backward(dy, x, None, kept, *statistics, weight, weight, *attributes, case.residual)


def empty(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str = "meta") -> torch.Tensor:
    """Return a tensor `[N, C, *S]`, contiguous or channels-last; on the meta device, it has no memory."""
    if layout == "contiguous":
        return torch.empty(shape, dtype=dtype, device=device)
    n, c, *s = shape
    return torch.empty((n, *s, c), dtype=dtype, device=device).movedim(-1, 1)
