"""Checks that several processes of a group run together."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PROCESSES = 2
Check = Callable[[int], None]


def spawn(function: Callable[..., None], args: tuple[Any, ...] = (), nprocs: int = PROCESSES, join: bool = True) -> Any:
    """Run a function in new processes, as `torch.multiprocessing.spawn` does, but import torch only once for all."""
    multiprocessing.set_forkserver_preload(["torch.distributed", "batchnorm.nn", "batchnorm.surgery"])
    return torch.multiprocessing.start_processes(function, args, nprocs, join, start_method="forkserver")


def join_group(rank: int, folder: str, seconds: int) -> None:
    """Make this process, with one thread, a member of the group; an exchange fails after these seconds."""
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timeout)


def run_checks(checks: Sequence[Check], folder: Path, seconds: int) -> None:
    """Run the checks in new processes, each with its rank, and assert that all of them end."""
    spawn(_work, (checks, str(folder), seconds))
    assert all((folder / f"{check.__name__}{rank}").exists() for check in checks for rank in range(PROCESSES))


def _work(rank: int, checks: Sequence[Check], folder: str, seconds: int) -> None:
    warnings.simplefilter("ignore")
    join_group(rank, folder, seconds)
    try:
        for check in checks:
            torch.manual_seed(0)
            check(rank)
            dist.barrier()
            Path(folder, f"{check.__name__}{rank}").touch()
    finally:
        dist.destroy_process_group()
