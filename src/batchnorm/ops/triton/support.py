"""Find out whether a device can use the kernels, and which variants it cannot use, and warn of both."""

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

_LAUNCHES = "batchnorm.ops.triton.launch"  # by name, because its import needs Triton


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
        importlib.import_module(_LAUNCHES)
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton does not import ({type(error).__name__}: {error})"
    return None


def _launch_problem(device: torch.device) -> str | None:
    """Return the reason why even the smallest kernel does not compile (which needs a C compiler) or start, or None."""
    try:
        importlib.import_module(_LAUNCHES).start_smallest_kernel(device)
    except UnusableVariantError as error:
        return f"Triton kernels do not start ({error.cause})"
    return None


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


class UnusableVariantError(Exception):
    """A variant of a kernel does not compile or start.

    Args:
        variant: The kernel, its tensors' dtypes and its constants.
        cause: The error, with its whole message.
    """

    def __init__(self, variant: str, cause: str) -> None:
        super().__init__(f"{variant}: {cause}")
        self.variant, self.cause = variant, cause


def cause_of(error: BaseException) -> str:
    """Return an error's type and its whole message."""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


# CUDA's messages if a variant's code cannot be loaded, or if it needs more than the device has.
_OF_ONE_VARIANT = (
    "image is invalid", "no kernel image", "PTX", "symbol not found", "invalid device function", "invalid argument",
    "too many resources requested",
)  # fmt: skip


def concerns_one_variant(error: Exception) -> bool:
    """Return whether `error`, raised by the first start of a variant, means that only this variant is unusable.

    This is every error of Triton's compiler, whatever its type, and those of loading the code. Other errors of the
    device, such as out of memory, must reach the caller.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return False
    text = str(error)
    return "[CUDA]" not in text or any(phrase in text for phrase in _OF_ONE_VARIANT)


# The variants that use eager, and why.
_unusable: dict[str, str] = {}


def give_up(operator: str, variant: str, cause: str) -> None:
    """Remember that calls that need a variant use eager, and warn once."""
    if variant not in _unusable:
        _unusable[variant] = cause
        _warn_once(
            f"batchnorm::{operator} uses plain torch operations, which are slower, where it needs the Triton kernel "
            f"{variant}. Other calls still use the kernels. The kernel does not compile or start. Report this "
            f"with the versions of torch and Triton, try other versions, or set {KERNELS}=eager to silence this "
            f"warning. The cause was {cause}"
        )


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
        f"batchnorm uses plain torch operations on CUDA devices, which are slower. Install what is missing, or set "
        f"{KERNELS}=eager to silence this warning. The reason: {found}"
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
    if found is not None:
        return f"eager: {found}"
    fallen_back = "".join(f"\neager: {variant}: {cause}" for variant, cause in _unusable.items())
    return "triton: compiled at first use" + (f", except{fallen_back}" if fallen_back else "")
