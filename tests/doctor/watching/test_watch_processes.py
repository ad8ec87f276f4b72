"""Two processes under DistributedDataParallel, each watching its own batches."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.doctor import BatchNormWarning, watch
from tests.processes import spawn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), batchnorm.SyncBatchNorm(8), nn.Linear(8, 2))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.part, x, use_reentrant=False)
        return y


def run(model: nn.Module, rank: int, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(rank + torch.randn(64 + 32 * rank, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        states = []
        for watched in (False, True):
            model = DistributedDataParallel(network())
            if watched:
                with watch(model, every=1, warn=False) as w:
                    run(model, rank, 4)
            else:
                run(model, rank, 4)
            states.append(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
        with pytest.warns(BatchNormWarning, match=rf"\[rank {rank}\] BN106"), watch(Checkpointed()) as twice:
            run(DistributedDataParallel(twice._root), rank, 3)
        torch.save((w.layers, [vars(record) for record in w.history]), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_each_process_watches_its_own_batches(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for rank, (layers, history) in enumerate(found):
        assert layers == ("1", "3")
        assert [(r["step"], r["layer"]) for r in history] == [(s, layer) for s in (2, 3, 4) for layer in layers]
        assert {(r["updates"], r["batch_size"]) for r in history} == {(1, 64 + 32 * rank)}
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one["mean_distance"] != other["mean_distance"]
