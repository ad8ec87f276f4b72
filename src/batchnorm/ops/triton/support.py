"""Whether the kernels can serve, and what is said where they cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

KERNELS = "BATCHNORM_GPU_KERNELS"
_NAMES = ("triton", "eager")

# The oldest architecture that Triton compiles for, and the Triton that came with the oldest torch that we support.
_LEAST = (7, 0)
_LEAST_TRITON = (3, 6)


def _chosen() -> str:
    name = os.environ.get(KERNELS, "triton")
    if name in _NAMES:
        return name
    _warn_once(f"{KERNELS} expects one of {', '.join(_NAMES)}, got {name!r}; triton is taken.")
    return "triton"


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def build_problem() -> str | None:
    """Why this build of torch has no use for the kernels, or None."""
    if torch.version.hip is not None:
        return "the kernels have not been tested on AMD GPUs"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None


def _import_problem() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < _LEAST_TRITON:
            return f"Triton {version} is older than {_LEAST_TRITON[0]}.{_LEAST_TRITON[1]}"
        importlib.import_module("batchnorm.ops.triton.launch")
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton does not import ({type(error).__name__}: {error})"
    return None


def _launch_problem(device: torch.device) -> str | None:
    """Whether a small kernel compiles and starts: Triton also needs a C compiler, once."""
    from batchnorm.ops.triton import launch

    try:
        launch.start_one_kernel(device)
    except Exception as error:  # the compiler's, the driver's, the operating system's
        return _does_not_start(error)
    return None


def _does_not_start(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"a Triton kernel does not start ({type(error).__name__}: {lines[-1]})"


def problem(device: torch.device) -> str | None:
    """Why the eager implementation serves on this device, or None; warned of once, unless it was chosen."""
    if device not in _known:
        if _capturing():  # nothing that is found while a graph is captured holds afterwards
            return None
        _known[device] = _find_problem(device)
    return _known[device]


# What was found on the devices that have been asked for.
_known: dict[torch.device, str | None] = {}


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def gives_up(device: torch.device, error: Exception) -> bool:
    """Whether `error` says that a kernel cannot be compiled or started here: eager serves from now on, with a warning.

    No result was computed then. Every other error is the caller's: it is out of memory, or the device is lost.
    """
    from triton.errors import TritonError

    if not isinstance(error, TritonError):
        return False
    found = _does_not_start(error)
    _warn(found)
    _known[device] = found
    return True


def _find_problem(device: torch.device) -> str | None:
    if _chosen() == "eager":
        return f"{KERNELS}=eager"
    found = build_problem()
    if found is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST:
            found = f"compute capability {capability[0]}.{capability[1]} is below {_LEAST[0]}.{_LEAST[1]}"
    found = found or _import_problem() or _launch_problem(device)
    if found is not None:
        _warn(found)
    return found


def _warn(found: str) -> None:
    _warn_once(
        f"batchnorm computes on CUDA devices in plain torch operations, slower: {found}. Install what is missing, "
        f"or set {KERNELS}=eager to accept it."
    )


def description() -> str:
    """What CUDA tensors are computed with, for `batchnorm.backends()`; starts nothing."""
    for found in _known.values():
        if found is not None:
            return f"eager: {found}"
    if _chosen() == "eager":
        return f"eager: {KERNELS}=eager"
    found = build_problem()
    if found is None and importlib.util.find_spec("triton") is None:
        found = "Triton is not installed"
    return "triton: compiled at first use" if found is None else f"eager: {found}"
