"""The machine, the versions and the global state of torch that networks train with."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batchnorm._version import __version__


def environment(processes: int, device: torch.device) -> dict[str, Any]:
    """Return versions, machine, and the numbers of threads and processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


@contextmanager
def restored(threads: int, device: str) -> Iterator[None]:
    """Use this number of threads in the block; afterwards restore the previous number and the random generators."""
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
