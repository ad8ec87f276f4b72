"""Load the compiled operators for torch, and describe the implementation that each of its devices uses.

No call falls back silently. If the compiled operators are missing, `backends()` gives the reason. If they exist but do
not load, a warning gives the reason once.
"""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

from batchnorm.compiled import CAPABILITY, FOLDER, Kernels, find_library, kernels
from batchnorm.ops.triton import support


class _Compiled:
    """The compiled operators in `folder`, or the reason why there are none."""

    def __init__(self, folder: Path, kernels: Kernels) -> None:
        self.kernels = kernels
        self.reason = kernels.reason or self._load(folder)
        if "did not load" in self.reason:
            warnings.warn(
                f"batchnorm uses plain torch operations, which are slower: {self.reason}. Reinstall batchnorm on this "
                f"machine, for torch {torch.__version__}, or set {CAPABILITY}=eager to silence this warning.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _load(self, folder: Path) -> str:
        """Load the library, which registers the operators. Return the reason if this fails, else an empty string."""
        path = find_library(folder, "batchnorm_cpu")
        if path is None:
            return "built with BATCHNORM_TORCH=OFF"
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            return f"the compiled operators did not load: {error}"
        return ""

    @property
    def library(self) -> ctypes.CDLL | None:
        """The library of the kernels that the operators run; None if there are no compiled operators."""
        return None if self.reason else self.kernels.library


_compiled = _Compiled(FOLDER, kernels())


def cpu_capabilities() -> tuple[str, ...]:
    """Return the instruction sets that build and processor have, best first; empty without compiled operators."""
    return tuple(_compiled.kernels.text("batchnorm_capabilities").split()) if _compiled.library else ()


def cpu_capability() -> str:
    """Return the CPU's implementation: an instruction set of `cpu_capabilities`, or "eager"."""
    return _compiled.kernels.text("batchnorm_capability") if _compiled.library else "eager"


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
    if not _compiled.library.batchnorm_set_capability(name.encode()):
        available = ", ".join(cpu_capabilities())
        raise ValueError(f"set_cpu_capability expects one of {available}, got {name!r}. Choose one of them.")


def descriptions() -> dict[str, str]:
    """Return the implementation for each type of device, and the reason if a faster one cannot be used."""
    cpu = f"compiled: {cpu_capability()}" if _compiled.library else f"eager: {_compiled.reason}"
    return {"cpu": cpu, "cuda": support.description(), "other": "eager: plain torch operations"}
