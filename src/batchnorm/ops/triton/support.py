"""Find out whether a device can use the kernels, and warn if it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

KERNELS = "BATCHNORM_GPU_KERNELS"
_NAMES = ("triton", "eager")

# The oldest architecture that Triton supports, and the Triton of the oldest torch that this library supports.
_LEAST_CAPABILITY = (7, 0)
_LEAST_TRITON = (3, 6)


def _chosen() -> str:
    name = os.environ.get(KERNELS, "triton")
    if name in _NAMES:
        return name
    _warn_once(f"{KERNELS} expects one of {', '.join(_NAMES)}, got {name!r}. Using triton.")
    return "triton"


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def build_problem() -> str | None:
    """Return the reason why this build of torch cannot use the kernels, or None."""
    if torch.version.hip is not None:
        return "the kernels have not been tested on AMD GPUs"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
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
    """Return the reason why a small kernel does not compile (which needs a C compiler) or start, or None."""
    from batchnorm.ops.triton import launch

    try:
        launch.start_one_kernel(device)
    except Exception as error:  # from the compiler, the driver or the operating system
        return _start_problem(error)
    return None


def _start_problem(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"a Triton kernel does not start ({type(error).__name__}: {lines[-1]})"


def problem(device: torch.device) -> str | None:
    """Return the reason why this device uses eager, or None; warn once, unless the user chose eager."""
    if device not in _known:
        if _capturing():  # a result found during graph capture is not valid afterwards
            return None
        _known[device] = _find_problem(device)
    return _known[device]


# The problem of each device that has been checked; None if it uses the kernels.
_known: dict[torch.device, str | None] = {}


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def switches_to_eager(device: torch.device, error: Exception) -> bool:
    """Return whether `error` means that a kernel cannot compile or start here; if so, warn and use eager from now on.

    Such an error arises before anything is computed. Other errors, such as out of memory, must reach the caller.
    """
    from triton.errors import TritonError

    if not isinstance(error, TritonError):
        return False
    found = _start_problem(error)
    _warn(found)
    _known[device] = found
    return True


def _find_problem(device: torch.device) -> str | None:
    if _chosen() == "eager":
        return f"{KERNELS}=eager"
    found = build_problem()
    if found is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            least = "{}.{}".format(*_LEAST_CAPABILITY)
            found = f"compute capability {capability[0]}.{capability[1]} is below {least}"
    found = found or _import_problem() or _launch_problem(device)
    if found is not None:
        _warn(found)
    return found


def _warn(found: str) -> None:
    _warn_once(
        f"batchnorm uses plain torch operations on CUDA devices, which are slower: {found}. Install what is missing, "
        f"or set {KERNELS}=eager to silence this warning."
    )


def description() -> str:
    """Return the implementation for CUDA tensors, for `batchnorm.backends()`, without starting a kernel."""
    for found in _known.values():
        if found is not None:
            return f"eager: {found}"
    if _chosen() == "eager":
        return f"eager: {KERNELS}=eager"
    found = build_problem()
    if found is None and importlib.util.find_spec("triton") is None:
        found = "Triton is not installed"
    return "triton: compiled at first use" if found is None else f"eager: {found}"
