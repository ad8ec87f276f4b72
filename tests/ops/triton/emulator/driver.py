"""The emulated device in the place of Triton's driver: it loads PTX as a GPU loads its machine code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from tests.ops.triton.emulator.device import Argument, Device, Loaded
from tests.ops.triton.emulator.faults import Unsupported

_SHARED = 227 << 10  # bytes of a program, on compute capability 9.0
_THREADS = 1024


class Driver:
    """The interface that Triton expects of a driver.

    Args:
        device: The emulated device.
        architecture: Its compute capability, times ten.
    """

    def __init__(self, device: Device, architecture: int = 90) -> None:
        self._device, self._architecture = device, architecture
        self.utils, self.launcher_cls = self, self._launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, Loaded, int, int, int]:
        """Return the module, the function, registers, spilled registers, and the largest number of threads."""
        return None, self._device.load(binary.decode(), shared), 0, 0, _THREADS

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, loaded: Loaded, *rest: Any) -> None:
            if (y, z) != (1, 1) or getattr(metadata, "num_ctas", 1) != 1:
                raise Unsupported("The emulator expects a grid of one dimension, without clusters.")
            arguments = rest[-len(source.signature) :]
            given = zip(source.signature.items(), arguments, strict=True)
            self._device.launch(
                loaded, x, [Argument(name, kind, value) for (name, kind), value in given if kind != "constexpr"]
            )

        return launch


@contextlib.contextmanager
def installed(device: Device, cache: Path, architecture: int = 90) -> Iterator[None]:
    """Make Triton compile for and launch on an emulated device. Real devices must not use the folder `cache`."""
    active, make_cubin, directory = driver._active, CUDABackend.make_cubin, os.environ.get("TRITON_CACHE_DIR")
    driver._active = Driver(device, architecture)
    CUDABackend.make_cubin = lambda self, source, *rest: source.encode()
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        yield
    finally:
        driver._active, CUDABackend.make_cubin = active, make_cubin
        del os.environ["TRITON_CACHE_DIR"]
        if directory is not None:
            os.environ["TRITON_CACHE_DIR"] = directory
