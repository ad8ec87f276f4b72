"""Triton's own launcher on a CUDA driver without a device, for CPU tensors: it compiles, loads and counts launches.

`install` changes the whole process, so use it in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

from batchnorm.ops.triton import tiling

SOURCE = Path(__file__).with_suffix(".c")


class Stub:
    """The loaded driver."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.stub_launches.restype = ctypes.c_long
        self._library = library

    def launches(self) -> int:
        """Return the number of launches so far."""
        return int(self._library.stub_launches())

    def fail_next(self) -> None:
        """Let the next load of a kernel, or the next launch, fail with an illegal memory access."""
        self._library.stub_fail_next()


def install(directory: Path, compiler: str) -> Stub:
    """Compile and load the driver, and make it Triton's.

    Args:
        directory: Where to write the library and Triton's cache.
        compiler: The C compiler.
    """
    path = directory / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(path), str(SOURCE)], check=True
    )
    stub = Stub(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    os.environ |= {"TRITON_LIBCUDA_PATH": str(directory), "TRITON_CACHE_DIR": str(directory / "cache"), "CC": compiler}

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    tiling.multiprocessors = lambda device: 132  # type: ignore[assignment]
    return stub
