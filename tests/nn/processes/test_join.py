"""Synchronized layers on processes with different numbers of batches: statistics of the existing samples only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.testing import assert_close

import batchnorm as bn
from tests.processes import run_checks

Data = list[list[Tensor]]  # for each process its batches


class Network(nn.Module):
    """Reshapes by the batch's size, and has an output that the loss does not need."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.linear, self.last = nn.Conv2d(3, 4, 3), norm(4), nn.Linear(64, 5), norm(5)
        self.unused = norm(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.conv(x)).relu()
        x = self.last(self.linear(x.view(x.size(0), -1)))
        return {"unused": self.unused(x), "y": x}


def network(norm: Callable[[int], nn.Module] = bn.SyncBatchNorm) -> nn.Module:
    torch.manual_seed(0)
    return Network(norm).double()


def data(*counts: int) -> Data:
    generator = torch.Generator().manual_seed(1)
    sizes = [[3 + process + step for step in range(count)] for process, count in enumerate(counts)]
    return [[torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) for n in each] for each in sizes]


def train(parallel: nn.Module, batches: list[Tensor], *, accumulated: int = 1) -> None:
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.1)
    for number, x in enumerate(batches, 1):
        if number % accumulated:
            with parallel.no_sync():
                parallel(x)["y"].square().mean().backward()
            continue
        parallel(x)["y"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(every: Data, norm: Callable[[int], nn.Module], accumulated: int = 1) -> nn.Module:
    """Train on one process with the joined batch: the sum of the processes' mean losses, divided by their number."""
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(max(map(len, every))):
        parts = [batches[step] for batches in every if step < len(batches)]
        results = model(torch.cat(parts))["y"].split([len(part) for part in parts])
        (sum(y.square().mean() for y in results) / len(every)).backward()
        if (step + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def wrapped(model: nn.Module) -> DDP:
    return DDP(model, find_unused_parameters=True)


def uneven_data_give_the_statistics_of_what_exists(rank: int) -> None:
    def renorm(channels: int, **options: Any) -> nn.Module:
        return bn.BatchRenorm(channels, **options)

    for norm, alone in ((bn.SyncBatchNorm, bn.BatchNorm), (lambda c: renorm(c, sync=True), renorm)):
        for counts in ((3, 1), (1, 3), (2, 2)):
            every = data(*counts)
            parallel = wrapped(network(norm))
            with bn.join(parallel):
                train(parallel, every[rank])
            assert_close(state(parallel.module), state(expected(every, alone)), rtol=1e-9, atol=1e-11)
            assert not any("_absent" in vars(module) for module in parallel.modules())


def a_process_without_batches_needs_an_example(rank: int) -> None:
    every = data(2, 0)
    parallel = wrapped(network())
    with bn.join(parallel, (torch.zeros(2, 3, 6, 6, dtype=torch.float64),)):
        train(parallel, every[rank])
    assert_close(state(parallel.module), state(expected(every, bn.BatchNorm)), rtol=1e-9, atol=1e-11)


def gradients_may_be_accumulated(rank: int) -> None:
    every = data(4, 1)
    every[1] = []
    parallel = wrapped(network())
    with bn.join(parallel, (torch.zeros(2, 3, 6, 6, dtype=torch.float64),)):
        train(parallel, every[rank], accumulated=2)
    model = expected(every, bn.BatchNorm, accumulated=2)
    assert_close(state(parallel.module), state(model), rtol=1e-9, atol=1e-11)


def evaluation_may_be_uneven_too(rank: int) -> None:
    every = data(3, 1)
    parallel = wrapped(network())
    before = copy.deepcopy(state(parallel.module))
    with bn.join(parallel), torch.no_grad():
        parallel.eval()
        for x in every[rank]:
            parallel(x)
        parallel.train()
    assert_close(state(parallel.module), before, rtol=0, atol=0)


def other_layers_keep_their_statistics_when_a_process_has_run_out(rank: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.SyncBatchNorm(4), nn.BatchNorm2d(4), nn.Dropout(0.5)).double()
    parallel = DDP(model, broadcast_buffers=False)
    random = torch.get_rng_state()
    with bn.join(parallel):
        for x in data(3, 1)[rank]:
            parallel(x).sum().backward()
        if rank == 1:
            random = torch.get_rng_state()
    assert model[1].num_batches_tracked == model[2].num_batches_tracked == 3
    if rank == 1:
        assert torch.equal(torch.get_rng_state(), random)


def ddps_own_join_is_refused_at_once(rank: int) -> None:
    parallel = wrapped(network())
    refused = r"a synchronized layer expects .* got a model in DistributedDataParallel\.join\(\).* Use batchnorm\.join"
    with pytest.raises(RuntimeError, match=refused), parallel.join():
        train(parallel, data(3, 1)[rank])
    parallel = wrapped(network())
    with pytest.raises(RuntimeError, match="exhausted"), parallel.join(throw_on_early_termination=True):
        train(parallel, data(3, 1)[rank])
    parallel = wrapped(network(bn.BatchNorm))
    with parallel.join():
        train(parallel, data(3, 1)[rank])


CHECKS = [
    uneven_data_give_the_statistics_of_what_exists,
    a_process_without_batches_needs_an_example,
    gradients_may_be_accumulated,
    evaluation_may_be_uneven_too,
    other_layers_keep_their_statistics_when_a_process_has_run_out,
    ddps_own_join_is_refused_at_once,
]


def test_uneven_data_give_the_result_of_one_process(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path, 30)


def test_join_refuses_other_models() -> None:
    with (
        pytest.raises(TypeError, match="join expects a model in DistributedDataParallel, got Network"),
        bn.join(network()),
    ):
        pass
