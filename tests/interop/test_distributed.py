"""DistributedDataParallel over gloo."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batchnorm as bn
from tests.processes import spawn

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), bn.BatchNormAct2d(4),
        nn.Flatten(), nn.Linear(64, 2),
    ).double()  # fmt: skip


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(4) % 2


def train(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        model = network()
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            x, labels = batch(rank, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(x), labels).backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def expected(world: int) -> list[dict[str, Tensor]]:
    """Train by hand: average the processes' gradients, and copy process 0's buffers before every forward."""
    models = [network() for _ in range(world)]
    for step in range(STEPS):
        gradients = []
        held = {key: value.clone() for key, value in models[0].named_buffers()}
        for rank, model in enumerate(models):
            for key, buffer in model.named_buffers():
                buffer.copy_(held[key])
            model.zero_grad()
            x, labels = batch(rank, step)
            nn.functional.cross_entropy(model(x), labels).backward()
            gradients.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            for model in models:
                for parameter, *each in zip(model.parameters(), *gradients, strict=True):
                    parameter -= 0.1 * sum(each) / world
    return [copy.deepcopy(model.state_dict()) for model in models]


@pytest.mark.parametrize("world", [1, 2])
def test_training_in_parallel_agrees_with_averaging_by_hand(world: int, tmp_path: Path) -> None:
    if world == 1:
        train(0, 1, str(tmp_path))
    else:
        spawn(train, (world, str(tmp_path)), nprocs=world)
    for rank, state in enumerate(expected(world)):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert_close(dict(found), dict(state), rtol=1e-9, atol=1e-11)
        assert found["1.num_batches_tracked"] == STEPS
