"""Where and with what a network was trained."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

EXTRAS = ("jinja2", "matplotlib", "rich", "scipy")


def environment(processes: int, device: torch.device) -> dict[str, Any]:
    """Returns versions, machine, and how many threads and processes compute."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "batchnorm": importlib.metadata.version("batchnorm"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def require_extras() -> None:
    """Checks that the packages are there that every comparison needs.

    Raises:
        ModuleNotFoundError: If not.
    """
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"a comparison needs the packages {', '.join(EXTRAS)}, and {', '.join(missing)} cannot be imported. "
            "Install them with: pip install 'batchnorm[compare]'",
            name=missing[0],
        )


def require(package: str, argument: str, extra: str) -> None:
    """Checks that a package is there that only one argument needs.

    Args:
        package: Its name.
        argument: What needs it, as a user writes it.
        extra: The extra of ours that installs it.

    Raises:
        ModuleNotFoundError: If not.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{argument} needs the package {package}, which cannot be imported. Install it with: "
            f"pip install 'batchnorm[{extra}]'",
            name=package,
        )


@contextmanager
def restored(threads: int, device: str) -> Iterator[None]:
    """Computes with so many threads, and puts back their number and the state of the random generators."""
    before = torch.get_num_threads()
    others = range(torch.cuda.device_count()) if str(device).startswith("cuda") else []
    with torch.random.fork_rng(devices=others):
        try:
            torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()
