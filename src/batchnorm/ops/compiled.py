"""Load the compiled operators, and report the implementation that each device uses.

No call falls back silently. If the compiled operators are missing, `backends()` gives the reason. If they exist but do
not load, a warning gives the reason once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

import torch

from batchnorm.ops.triton import support

CAPABILITY = "BATCHNORM_CPU_CAPABILITY"
_NAMES = ("libbatchnorm_cpu.so", "libbatchnorm_cpu.dylib", "batchnorm_cpu.dll")


class _Compiled:
    """The compiled operators, or the reason why there are none."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.reason = "no compiler at build time"

    def load(self, directory: Path) -> None:
        """Load the library in `directory`, which registers the operators."""
        if os.environ.get(CAPABILITY) == "eager":
            self.reason = f"{CAPABILITY}=eager"
            return
        found = [path for name in _NAMES if (path := directory / name).is_file()]
        if not found:
            return
        try:
            torch.ops.load_library(str(found[0]))
            library = ctypes.CDLL(str(found[0]))
            for name in ("batchnorm_cpu_capability", "batchnorm_cpu_capabilities", "batchnorm_cpu_capability_problem"):
                getattr(library, name).restype = ctypes.c_char_p
        except (OSError, AttributeError, RuntimeError) as error:
            self.reason = f"the compiled operators did not load: {error}"
            warnings.warn(
                f"batchnorm uses plain torch operations, which are slower: {self.reason}. Reinstall batchnorm for "
                f"torch {torch.__version__}, or set {CAPABILITY}=eager to silence this warning.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.library = library
        problem = library.batchnorm_cpu_capability_problem()
        if problem:
            warnings.warn(f"{problem.decode()}", RuntimeWarning, stacklevel=2)

    def text(self, name: str) -> str:
        assert self.library is not None
        return str(getattr(self.library, name)().decode())


_compiled = _Compiled()
_compiled.load(Path(__file__).parents[1])


def cpu_capabilities() -> tuple[str, ...]:
    """Return the instruction sets that build and processor have, best first; empty without compiled operators."""
    return tuple(_compiled.text("batchnorm_cpu_capabilities").split()) if _compiled.library else ()


def cpu_capability() -> str:
    """Return the CPU's implementation: an instruction set of `cpu_capabilities`, or "eager"."""
    return _compiled.text("batchnorm_cpu_capability") if _compiled.library else "eager"


def set_cpu_capability(name: str) -> None:
    """Use another instruction set from now on; `BATCHNORM_CPU_CAPABILITY` sets the one used at load.

    Args:
        name: One of `cpu_capabilities()`.

    Raises:
        ValueError: this build or this processor does not have it, or there are no compiled operators.
    """
    if not _compiled.library:
        raise ValueError(
            f"set_cpu_capability expects compiled operators, got none ({_compiled.reason}). Reinstall batchnorm with a "
            "C++ compiler, or leave this call out."
        )
    if not _compiled.library.batchnorm_set_cpu_capability(name.encode()):
        available = ", ".join(cpu_capabilities())
        raise ValueError(f"set_cpu_capability expects one of {available}, got {name!r}. Choose one of them.")


class Backends(dict[str, str]):
    """The implementation that each type of device uses, with `hints` for more speed; prints as a table."""

    def __init__(self, backends: dict[str, str], hints: tuple[str, ...]) -> None:
        super().__init__(backends)
        self.hints = hints

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{device:{width}}  {what}" for device, what in self.items()]
        return "\n".join([*lines, *(f"hint: {hint}" for hint in self.hints)])


def backends() -> Backends:
    """Return the implementation for each type of device, and the reason if a faster one cannot be used.

    Examples:
        >>> sorted(backends())
        ['cpu', 'cuda', 'other']
    """
    cpu = f"compiled: {cpu_capability()}" if _compiled.library else f"eager: {_compiled.reason}"
    hints = (_ALLOCATOR_HINT,) if _maps_large_tensors_afresh() else ()
    return Backends({"cpu": cpu, "cuda": support.description(), "other": "eager: plain torch operations"}, hints)


_ALLOCATOR_HINT = (
    "each allocation of a tensor above 32 MB maps new memory, which is slow; MALLOC_MMAP_THRESHOLD_=1073741824 "
    "MALLOC_TRIM_THRESHOLD_=4294967296 in the environment keeps their memory (documentation: Training on a CPU)"
)


def _maps_large_tensors_afresh() -> bool:
    """Return whether malloc is glibc's with its default settings; other allocators keep large blocks."""
    return (
        sys.platform == "linux"
        and "MALLOC_MMAP_THRESHOLD_" not in os.environ
        and "glibc.malloc.mmap_threshold" not in os.environ.get("GLIBC_TUNABLES", "")
        and "malloc" not in os.environ.get("LD_PRELOAD", "")
        and os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "1"
    )
