"""Recalibration by two processes, each with its own share of the data."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from batchnorm.recalibration import recalibrate
from tests.processes import spawn
from tests.recalibration.models import assert_as_before, batches, network, snapshot

SHARES = {"ragged": (slice(0, 3), slice(3, 4)), "empty": (slice(0, 0), slice(0, 4))}


def share(kind: str, rank: int) -> list[Tensor]:
    return [x.double() for x in batches()[SHARES[kind][rank]]]


def failing(rank: int) -> Any:
    yield from share("ragged", rank)
    if rank == 1:
        raise OSError("disk gone")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        model = network().double()
        found: dict[str, Any] = {}
        for kind in SHARES:
            for passes, cache_bytes in (("single", 0), ("sequential", 0), ("sequential", 2**30)):
                result = recalibrate(model, share(kind, rank), passes=passes, cache_bytes=cache_bytes, prior=10)
                found[f"{kind} {passes} {cache_bytes}"] = result.model.state_dict(), result.report.samples
        parallel = DistributedDataParallel(model)
        recalibrate(parallel, share("ragged", rank), inplace=True)
        found["parallel"] = model.state_dict()

        for passes in ("single", "sequential"):
            before = snapshot(model)
            error, message = (OSError, "disk gone") if rank == 1 else (RuntimeError, "rank 1 failed with OSError: disk")
            with pytest.raises(error, match=message):
                recalibrate(model, failing(rank), passes=passes, inplace=True)
            assert_as_before(model, before)
        with pytest.raises(ValueError, match="the same model and layers on every rank"):
            recalibrate(model, share("ragged", rank), only="1" if rank else ["1", "5"])
        alone, report = recalibrate(model, share("ragged", rank), synchronize=False)
        found["alone"] = alone.state_dict(), report.ranks
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_with_different_shares_end_with_the_same_statistics_as_one_process(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    everything = [x.double() for x in batches()]
    for name in ranks[0]:
        if name in ("alone", "parallel"):
            continue
        expected, _ = recalibrate(network().double(), everything, passes=name.split()[1], prior=10)
        for rank in ranks:
            state, samples = rank[name]
            assert samples == sum(map(len, everything))
            assert_close(dict(state), dict(expected.state_dict()), rtol=1e-10, atol=1e-12)
        assert_close(dict(ranks[0][name][0]), dict(ranks[1][name][0]), rtol=0, atol=0)
    expected, _ = recalibrate(network().double(), everything)
    assert_close(dict(ranks[0]["parallel"]), dict(expected.state_dict()), rtol=1e-10, atol=1e-12)
    for rank in (0, 1):
        expected, _ = recalibrate(network().double(), share("ragged", rank))
        state, count = ranks[rank]["alone"]
        assert count == 1
        assert_close(dict(state), dict(expected.state_dict()), rtol=0, atol=0)


def test_a_group_of_one_needs_no_other(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, report = recalibrate(nn.BatchNorm1d(2), [torch.rand(4, 2)])
        assert report.ranks == 1
    finally:
        dist.destroy_process_group()
