"""Find and load the compiled kernels, and the library that offers them to XLA. Neither needs a framework.

`batchnorm.ops.compiled` loads the third library, which registers the kernels with torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

CAPABILITY = "BATCHNORM_CPU_CAPABILITY"
FOLDER = Path(__file__).parent
MISSING = "this build has no kernels (no C++ compiler, or wheel.cmake=false)"

_TEXTS = ("batchnorm_capability", "batchnorm_capabilities", "batchnorm_capability_problem")


def find_library(folder: Path, name: str) -> Path | None:
    """Return the file of the library `name` in `folder`, or None."""
    names = {"darwin": f"lib{name}.dylib", "win32": f"{name}.dll"}
    # CMake names modules .so on macOS, too
    candidates = (names.get(sys.platform, f"lib{name}.so"), f"lib{name}.so")
    return next((path for candidate in candidates if (path := folder / candidate).is_file()), None)


class Kernels:
    """The kernels in `folder`, or the reason why there are none.

    Attributes:
        library: The loaded library, or None.
        reason: Why it is None; otherwise empty.
    """

    def __init__(self, folder: Path) -> None:
        self.library: ctypes.CDLL | None = None
        self.reason = MISSING
        if os.environ.get(CAPABILITY) == "eager":
            self.reason = f"{CAPABILITY}=eager"
            return
        path = find_library(folder, "batchnorm_kernels")
        if path is None:
            return
        try:
            library = ctypes.CDLL(str(path))
            for name in _TEXTS:
                getattr(library, name).restype = ctypes.c_char_p
            problem = (library.batchnorm_capability_problem() or b"").decode()
            if library.batchnorm_capability() is None:
                raise OSError(problem)
        except (OSError, AttributeError) as error:
            self.reason = f"the compiled kernels did not load: {error}"
            return
        self.library, self.reason = library, ""
        if problem:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)

    def text(self, name: str) -> str:
        """Return what a function of the library returns, such as `batchnorm_capability`."""
        assert self.library is not None
        return str(getattr(self.library, name)().decode())


@functools.cache
def kernels() -> Kernels:
    """Return the installed kernels; the first call loads them."""
    return Kernels(FOLDER)


class XlaKernels:
    """The kernels as custom calls of XLA, or the reason why JAX cannot use them. Does not import JAX.

    Attributes:
        library: The loaded library, or None.
        reason: Why it is None; otherwise empty.
    """

    def __init__(self, folder: Path, kernels: Kernels) -> None:
        self.library: ctypes.CDLL | None = None
        self.reason = kernels.reason
        if kernels.library is None:
            return
        path = find_library(folder, "batchnorm_xla")
        if path is None:
            self.reason = "built with BATCHNORM_XLA=OFF"
            return
        try:
            library = ctypes.CDLL(str(path))
            built = library.batchnorm_xla_ffi_major(), library.batchnorm_xla_ffi_minor()
        except (OSError, AttributeError) as error:
            self.reason = f"the compiled kernels did not load: {error}"
            return
        self.reason = _refusal(built, ffi_version())
        if not self.reason:
            self.library = library


def _refusal(built: tuple[int, int], installed: tuple[int, int] | None) -> str:
    """Return why a jaxlib cannot use a library built for another version of the FFI; empty if it can.

    A newer jaxlib accepts older libraries. An older one refuses newer libraries when it starts its CPU backend, which
    would then be missing. So the version is checked before the registration.
    """
    if installed is None:
        return "the version of XLA's FFI is unknown, because jaxlib has no headers"
    if built[0] == installed[0] and built[1] <= installed[1]:
        return ""
    needed, got = (".".join(map(str, version)) for version in (built, installed))
    return f"the kernels need version {needed} of XLA's FFI, and the installed jaxlib has {got}"


def ffi_version() -> tuple[int, int] | None:
    """Return the version of the installed jaxlib's FFI from its headers, or None."""
    spec = find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return None
    try:
        header = (Path(spec.origin).parent / "include/xla/ffi/api/c_api.h").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header, re.MULTILINE))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


@functools.cache
def xla_kernels() -> XlaKernels:
    """Return the installed kernels for XLA; the first call loads them."""
    return XlaKernels(FOLDER, kernels())


def jax_description() -> str:
    """Return the implementation that `batchnorm.jax` uses on the CPU, and the reason if it is not the kernels."""
    found = xla_kernels()
    if found.library is None:
        return f"composition: {found.reason}"
    return f"compiled: {kernels().text('batchnorm_capability')}"
