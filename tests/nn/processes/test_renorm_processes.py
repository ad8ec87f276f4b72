"""Batch renormalization with the statistics of two processes: as one process with the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.nn import BatchNorm2d, BatchRenorm2d
from tests.processes import spawn

CUT = 3  # of 4 samples, so that the processes have different shares
WAYS: dict[str, Callable[[BatchRenorm2d], Callable[..., Tensor]]] = {
    "plain": lambda layer: layer,
    "masked": lambda layer: layer,
    "reentrant": lambda layer: partial(checkpoint, layer, use_reentrant=True),
    "not reentrant": lambda layer: partial(checkpoint, layer, use_reentrant=False),
    "batch normalization": lambda layer: layer,
}


def layer_for(way: str, sync: bool) -> BatchRenorm2d:
    limits = {"rmax": 1.0, "dmax": 0.0} if way == "batch normalization" else {"rmax": 1.2, "dmax": 0.3}
    return BatchRenorm2d(3, momentum=0.3, dtype=torch.float64, sync=sync, **limits)


def steps(layer: torch.nn.Module, way: str, share: slice) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the results of three steps of two calls and one backward: per process, summed, and equal on all."""
    generator = torch.Generator().manual_seed(2)
    shares, sums = [], []
    for _ in range(3):
        layer.zero_grad()
        leaves, results = [], []
        for _ in range(2):
            x = (torch.randn(4, 3, 5, 4, generator=generator, dtype=torch.float64) * 2 + 1)[share]
            mask = (torch.rand(4, 5, 4, generator=generator) < 0.6)[share]
            leaves.append(x.clone().requires_grad_())
            results.append(WAYS[way](layer)(leaves[-1], *([mask] if way == "masked" else [])))
        sum((y.pow(2) * torch.arange(y.shape[-1])).sum() for y in results).backward()
        shares += [*(y.detach() for y in results), *(leaf.grad for leaf in leaves)]
        sums += [p.grad.clone() for p in layer.parameters()]
    return shares, sums, list(layer.buffers())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        share = slice(None, CUT) if rank == 0 else slice(CUT, None)
        torch.save({way: steps(layer_for(way, sync=True), way, share) for way in WAYS}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[list[Tensor], ...]]]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(work, (str(folder),))
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(found: list[dict[str, tuple[list[Tensor], ...]]], way: str) -> None:
    shares, sums, alike = steps(layer_for(way, sync=False), way, slice(None))
    first, second = (rank[way] for rank in found)
    joined = [torch.cat(pair) for pair in zip(first[0], second[0], strict=True)]
    assert_close(joined, shares, rtol=1e-11, atol=1e-11)
    assert_close([a + b for a, b in zip(first[1], second[1], strict=True)], sums, rtol=1e-11, atol=1e-11)
    for a, b, expected in zip(first[2], second[2], alike, strict=True):
        assert torch.equal(a, b)
        assert_close(a, expected, rtol=1e-12, atol=1e-12)


def test_without_other_processes_sync_changes_nothing() -> None:
    alone, synchronizing = layer_for("plain", sync=False), layer_for("plain", sync=True)
    for a, b in zip(steps(alone, "plain", slice(None)), steps(synchronizing, "plain", slice(None)), strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    same, plain = layer_for("batch normalization", sync=True), BatchNorm2d(3, momentum=0.3, dtype=torch.float64)
    x = torch.randn(4, 3, 5, 4, dtype=torch.float64)
    assert torch.equal(same(x), plain(x))
