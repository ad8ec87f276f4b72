"""Load the compiled operators for torch, and describe the implementation that each of its devices uses.

No call falls back silently. If the compiled operators are missing, `backends()` gives the reason. If they exist but do
not load, a warning gives the reason once.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from batchnorm.compiled import CAPABILITY, FOLDER, Kernels, find_library, kernels
from batchnorm.ops.triton import support

AUTOGRAD = "BATCHNORM_AUTOGRAD"
NODE = "batchnorm_autograd"

# The interface of the node's module, which csrc/pytorch/autograd.cpp also states.
INTERFACE = 4


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


class Native:
    """The node for torch's autograd in C++ in `folder`, or the reason why there is none.

    It is optional: without it, a node in Python is used. It needs torch's C++ API, which changes with every minor
    version. Each library therefore works with one minor version, which its name contains. No other library is loaded.

    Attributes:
        module: The loaded module, whose `batch_norm` computes a layer's call; or None.
        reason: Why it is None; otherwise empty.
    """

    def __init__(self, folder: Path, version: str = torch.__version__, reason: str = "") -> None:
        """Load the library for torch `version`, unless there is a `reason` against it."""
        self.module: Any = None
        self.reason = reason or _native_refusal(version)
        if self.reason:
            return
        path = find_library(folder, _library_name(version))
        if path is None:
            built = sorted(path.stem.removeprefix(f"lib{NODE}_") for path in folder.glob(f"*{NODE}_*"))
            versions = ", ".join(name.replace("_", ".") for name in built)
            self.reason = f"built for torch {versions}" if versions else "this build contains no node in C++"
            return
        try:
            loader = importlib.machinery.ExtensionFileLoader(f"batchnorm.{NODE}", str(path))
            spec = importlib.util.spec_from_file_location(f"batchnorm.{NODE}", path, loader=loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except ImportError as error:
            self.reason = f"it did not load: {error}"
            return
        if getattr(module, "INTERFACE", None) != INTERFACE:
            self.reason = "it was built from other sources of batchnorm: reinstall batchnorm, or run make setup"
            return
        self.module = module

    def __str__(self) -> str:
        """Return the description in `backends()`."""
        return f"python: {self.reason}" if self.reason else "native"


def _library_name(version: str) -> str:
    major, minor = version.split(".")[:2]
    return f"{NODE}_{major}_{minor}"


def _native_refusal(version: str) -> str:
    """Return why this process cannot use any library; empty if it can."""
    if os.environ.get(AUTOGRAD) == "python":
        return f"{AUTOGRAD}=python"
    if "t" in getattr(sys, "abiflags", ""):
        return "the free-threaded Python has no stable ABI"
    if re.fullmatch(r"\d+\.\d+\.\d+(\+.*)?", version) is None:
        return f"torch {version} is not a release"
    return ""


_compiled = _Compiled(FOLDER, kernels())
_native = Native(FOLDER, reason=_compiled.reason)


def cpu_capabilities() -> tuple[str, ...]:
    """Return the instruction sets that build and processor have, best first; empty without compiled operators."""
    return tuple(_compiled.kernels.text("batchnorm_capabilities").split()) if _compiled.library else ()


def autograd_module() -> Any:
    """Return the module with the node for torch's autograd in C++, or None."""
    return _native.module


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
    return {
        "cpu": cpu,
        "cpu autograd": str(_native),
        "cuda": support.description(),
        "other": "eager: plain torch operations",
    }
