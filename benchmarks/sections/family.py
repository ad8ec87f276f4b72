"""The time of each layer of the family relative to our plain batch normalization, in one process and in two."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm
from batchnorm import ops
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import alternate
from benchmarks.subjects.cases import shape_text

KEY = ("processes", "shape", "layer")
SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14))
QUICK_SHAPES = ((8, 16, 14, 14),)
PLAIN = "BatchNorm"
GROUP_SIZE = 16
DECORRELATED = f"DecorrelatedBatchNorm, groups of {GROUP_SIZE}"
PRODUCTS = "matrix products of DecorrelatedBatchNorm alone"
SYNC, COLLECTIVES = "SyncBatchNorm", "its collectives alone"
WITHOUT_COLLECTIVES = "its passes alone, without collectives"

Forward = Callable[[Tensor], Tensor]


def _layers(shape: tuple[int, ...]) -> dict[str, Forward]:
    """Return every layer, as it is called in training, by its name in the table."""
    n, c = shape[:2]
    ours = batchnorm.nn
    mask = torch.ones(n, *shape[2:], dtype=torch.bool)
    mask[..., -1] = False
    halves, classes = torch.arange(n) % 2, torch.arange(n) % 10
    domain = ours.DomainBatchNorm2d(c, num_domains=2)
    conditional = ours.ConditionalBatchNorm2d(c, num_classes=10)
    plain = ours.BatchNorm2d(c)
    return {
        PLAIN: ours.BatchNorm2d(c),
        "BatchNorm, mask": lambda x: plain(x, mask=mask),
        "FrozenBatchNorm": ours.FrozenBatchNorm2d(c),
        "FrozenBatchNorm, trainable γ and β": ours.FrozenBatchNorm2d(c, trainable_affine=True),
        "BatchRenorm": ours.BatchRenorm2d(c),
        "GhostBatchNorm, parts of 8": ours.GhostBatchNorm2d(c, ghost_size=8),
        "SyncBatchNorm, one process": ours.SyncBatchNorm(c),
        "DomainBatchNorm, one domain a batch": lambda x: domain(x, 0),
        "DomainBatchNorm, a domain per sample": lambda x: domain(x, halves),
        "ConditionalBatchNorm, 10 classes": lambda x: conditional(x, classes),
        DECORRELATED: ours.DecorrelatedBatchNorm2d(c, group_size=GROUP_SIZE),
        "torch.nn.BatchNorm2d": nn.BatchNorm2d(c),
        "torch.nn.GroupNorm, 8 groups": nn.GroupNorm(8, c),
    }


def _step(forward: Forward, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        forward(x).backward(dy)
        x.grad = None

    return step


def _products(x: Tensor, size: int) -> Callable[[], None]:
    """Return the products that whitening needs at least: two in forward and three in backward, by torch's `bmm`."""
    groups = x.detach().reshape(-1, size, x[0, 0].numel())
    matrices, result = torch.randn(len(groups), size, size), torch.empty_like(groups)

    def step() -> None:
        for _ in range(2):
            torch.bmm(groups, groups.mT)
        for _ in range(3):
            torch.bmm(matrices, groups, out=result)

    return step


def measure_family(options: Options, table: Table) -> None:
    """Write the time of a training step of each layer: in this process, then in two with half of the threads each."""
    if table.measured():
        return
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        torch.manual_seed(0)
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
        steps = {name: _step(forward, x, dy) for name, forward in _layers(shape).items()}
        steps[PRODUCTS] = _products(x, GROUP_SIZE)
        times = alternate(steps, 10 * options.seconds, least=2 if options.quick else 7)
        table.append([_row(1, shape, name, t.seconds, times[PLAIN].seconds) for name, t in times.items()])
        table.append(_two_processes(shape, 4 if options.quick else 40))
        print(f"family measured: {shape_text(shape)}", flush=True)


def _row(processes: int, shape: tuple[int, ...], layer: str, seconds: np.ndarray, plain: np.ndarray) -> Row:
    return {
        "processes": processes,
        "shape": shape_text(shape),
        "layer": layer,
        **{f"p{p}_ms": float(np.percentile(seconds, p)) * 1e3 for p in (20, 50, 80)},
        "ratio": float(np.median(seconds) / np.median(plain)),
    }


def _two_processes(shape: tuple[int, ...], rounds: int) -> list[Row]:
    """Return the rows for two processes, each with half of the batch."""
    half = (shape[0] // 2, *shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one_of_two, (folder, half, rounds), nprocs=2)
        found = np.load(Path(folder, "times.npz"))
        return [
            _row(2, half, name, found[name], found[PLAIN]) for name in (PLAIN, SYNC, WITHOUT_COLLECTIVES, COLLECTIVES)
        ]


def _one_of_two(rank: int, folder: str, shape: tuple[int, ...], rounds: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    packet = torch.zeros(4 * shape[1], dtype=torch.float64)  # about the size that forward and backward send
    packets = [torch.empty_like(packet) for _ in range(2)]

    sync = batchnorm.nn.SyncBatchNorm(shape[1])

    def without_collectives(x: Tensor) -> Tensor:
        statistics = ops.batch_moments(x)
        return ops.batch_statistics_norm_by_parts(x, statistics, sync.weight, sync.bias, None, sync.eps)

    def collectives() -> None:
        dist.all_gather(packets, packet)
        dist.all_reduce(packet)

    calls: dict[str, Callable[[], Any]] = {
        PLAIN: _step(batchnorm.nn.BatchNorm2d(shape[1]), x, dy),
        SYNC: _step(sync, x, dy),
        WITHOUT_COLLECTIVES: _step(without_collectives, x, dy),
        COLLECTIVES: collectives,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            dist.barrier()  # so that no process waits for the other's previous call
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        np.savez(Path(folder, "times.npz"), **{name: np.array(own) for name, own in seconds.items()})
    dist.destroy_process_group()
