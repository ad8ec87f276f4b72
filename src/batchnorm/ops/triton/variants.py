"""Start kernels with little work on the host. Importing this module imports Triton.

A *variant* is a kernel compiled for compile-time constants and for what Triton specializes: the dtype of each tensor,
whether its address is a multiple of 16, whether it is absent, and which sizes exceed 32 bits. Triton determines the
variant in Python for every launch, which takes 20 µs for 25 arguments. Here, Triton starts each variant of a `Launch`
once. Later starts of the variant call its compiled launcher directly.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from batchnorm.ops.triton import support

# The masks that backward recomputes need the same fused products in all kernels. Triton 3.10 fuses none by default.
_OPTIONS = {"enable_fp_fusion": True}

# One thread at a time. Otherwise, threads that need the same new variant would each compile and load it.
_first_start = threading.RLock()

# The first parameters of Triton's launcher, in every version that was tested.
_LAUNCHER = ["self", "gridX", "gridY", "gridZ", "stream", "function"]


class Bound(NamedTuple):
    """A variant on one device, ready to start: Triton's launcher for it, and the arguments that never change."""

    run: Any
    stream_of: Any
    device: int
    function: Any
    metadata: Any
    constants: tuple[None, ...]  # the launcher skips them


class Kernel:
    """A kernel, and why some of its variants are unusable.

    Args:
        function: A function compiled by `triton.jit`, whose parameters are tensors, floats, sizes and constants, in
            this order.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.causes: dict[tuple[Any, ...], str] = {}  # an exception would keep its tensors


class Launch:
    """A launch of a kernel, which can be started many times, with little work on the host.

    Args:
        kernel: The kernel.
        grid: The number of programs.
        sizes: Integers, which cause another compilation only where they exceed 32 bits.
        constants: Compile-time constants and Triton's options, in the same order for all launches of the kernel.
    """

    def __init__(self, kernel: Kernel, grid: tuple[int], sizes: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.grid, self.sizes, self.constants = kernel, grid, sizes, constants
        self._same = (*(size >> 31 > 0 for size in sizes), *constants.values())
        self._bound: dict[tuple[Any, ...], Bound] = {}

    def start(self, tensors: Sequence[Tensor | None], floats: Sequence[float]) -> Bound | None:
        """Start a program for each element of the grid, on the current device and stream.

        Args:
            tensors: Tensors of the current device, None for absent ones; the first is never absent.
            floats: Floating-point scalars. Integers are converted, because Triton would compile another variant.

        Returns:
            The variant, or None if only Triton can start it.

        Raises:
            UnusableVariantError: the variant does not compile or start; it was not started now or before.
        """
        pointers: list[int | None] = []
        key: list[Any] = [tensors[0].get_device()]  # type: ignore[union-attr]
        low = 0
        for t in tensors:
            if t is None:
                pointers.append(None)
                key.append(None)
            else:
                pointer = t.data_ptr()
                pointers.append(pointer)
                key.append(t.dtype)
                low |= pointer
        if low & 15:
            key += [pointer is None or pointer & 15 == 0 for pointer in pointers]
        variant = tuple(key)
        bound = self._bound.get(variant)
        if bound is None or hooked():
            self._start_by_triton(variant, tensors, floats)
            return self._bound.get(variant)
        run, stream_of, device, function, metadata, skipped = bound
        run(
            self.grid[0], 1, 1, stream_of(device), function, metadata, None, None, None,
            *pointers, *floats, *self.sizes, *skipped,
        )  # fmt: skip
        return bound

    def _start_by_triton(
        self, variant: tuple[Any, ...], tensors: Sequence[Tensor | None], floats: Sequence[float]
    ) -> None:
        compiled: Any = None
        function, causes, whole = self.kernel.function, self.kernel.causes, (*variant, *self._same)
        if whole not in causes:
            try:
                with _first_start:
                    compiled = function[self.grid](
                        *tensors, *map(float, floats), *self.sizes, **self.constants, **_OPTIONS
                    )
            except Exception as error:  # from the compiler, the driver or the operating system
                if not support.concerns_one_variant(error):
                    raise
                causes[whole] = support.cause_of(error)
        if whole in causes:  # outside the handler, so that no traceback keeps the tensors
            raise support.UnusableVariantError(self._description(tensors), causes[whole])
        if variant not in self._bound and _can_be_bound(compiled):
            skipped = (None,) * (len(function.arg_names) - len(tensors) - len(floats) - len(self.sizes))
            active = driver.active
            self._bound[variant] = Bound(
                compiled.run, active.get_current_stream, active.get_current_device(), compiled.function,
                compiled.packed_metadata, skipped,
            )  # fmt: skip

    def _description(self, tensors: Sequence[Tensor | None]) -> str:
        """Return the kernel's name, the dtypes of its tensors, and its constants."""
        function = self.kernel.function
        names = (name.removesuffix("_ptr") for name in function.arg_names)
        dtypes = {
            name: str(t.dtype).removeprefix("torch.") for name, t in zip(names, tensors, strict=False) if t is not None
        }
        text = ", ".join(f"{name}={value}" for name, value in (dtypes | self.constants).items())
        return f"{function.fn.__name__}({text})"


class Start(NamedTuple):
    """A launch and its arguments. `scratch` holds its tensors for results of splits and for counters, if any."""

    launch: Launch
    tensors: tuple[Tensor | None, ...]
    floats: tuple[float, ...] = ()
    scratch: tuple[Tensor | None, Tensor | None] = (None, None)

    def run(self) -> Bound | None:
        """Start the launch; see `Launch.start`."""
        return self.launch.start(self.tensors, self.floats)


def run(starts: Sequence[Start]) -> list[Bound | None]:
    """Start launches, one after the other; see `Launch.start`."""
    return [start.run() for start in starts]


def hooked() -> bool:
    """Return whether a profiler wants to see each launch, which Triton shows it."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _can_be_bound(kernel: Any) -> bool:
    """Return whether Triton's launcher for this kernel is the known one; the interpreter, for example, has none."""
    if not all(hasattr(kernel, name) for name in ("packed_metadata", "function", "run")):
        return False
    launcher = type(kernel.run)
    return launcher.__name__ == "CudaLauncher" and [*inspect.signature(launcher.__call__).parameters][:6] == _LAUNCHER
