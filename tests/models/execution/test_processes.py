"""A failure on one rank raises an error at once on all ranks. The model is unchanged, and the group stays usable."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.models.execution.processes import Processes
from tests.processes import join_group, run_checks, spawn

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(bn.BatchNorm2d(3), nn.ReLU(), bn.BatchNorm2d(3))


@contextmanager
def failing(model: nn.Module, mine: type[BaseException], message: str) -> Iterator[None]:
    """Expect that the block fails, leaves the model unchanged, and leaves a group that still works."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(mine, match=message):
        yield
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert modes == [module.training for module in model.modules()]
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2


def endless(stop_at: int, error: BaseException | None) -> Iterator[Tensor]:
    """Batches without end, or an error after some of them."""
    for number in itertools.count():
        if error is not None and number == stop_at:
            raise error
        time.sleep(0.001)
        yield X


def arguments_are_checked_together(rank: int) -> None:
    model = network()
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"passes": "twice"}, ValueError, "passes"),
        ({"prior": -1.0}, ValueError, "prior"),
        ({"max_samples": 0}, ValueError, "max_samples"),
        ({"only": "absent.*"}, ValueError, "matches none"),
        ({"only": 7}, TypeError, "a pattern"),
        ({"data": 7}, TypeError, "data"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ]
    for arguments, error, text in wrong:
        given = {"data": [X], **(arguments if rank else {})}
        expected = (error, text) if rank else (RuntimeError, f"recalibrate stopped because rank 1 failed.*{text}")
        for inplace in (True, False):
            with failing(model, *expected):
                bn.recalibrate(model, **given, inplace=inplace)
    for name, one, other in (("passes", "single", "sequential"), ("prior", 0.0, 3.0), ("shared", "pool", "separate")):
        with failing(model, ValueError, f"recalibrate expects the same {name} on every rank"):
            bn.recalibrate(model, [X], inplace=True, **{name: other if rank else one})
    for arguments, text in (({"budget": -1}, "budget"), ({"max_samples": 0}, "max_samples"), ({"data": 7}, "data")):
        expected = (Exception, text) if rank else (RuntimeError, f"diagnose stopped because rank 1 failed.*{text}")
        with failing(model, *expected):
            bn.diagnose(model, **(arguments if rank else {}), process_group=dist.group.WORLD)


def a_failure_in_the_data_stops_the_others_at_once(rank: int) -> None:
    model = network()
    for error, passes in itertools.product((OSError("disk gone"), KeyboardInterrupt()), ("single", "sequential")):
        expected = (type(error), "") if rank else (RuntimeError, f"rank 1 failed with {type(error).__name__}")
        data = endless(2, error if rank else None)
        with failing(model, *expected):
            bn.recalibrate(model, data, passes=passes, inplace=True)
        with failing(model, *expected):
            bn.diagnose(model, endless(2, error if rank else None), max_samples=None, process_group=dist.group.WORLD)


def a_failure_at_the_end_undoes_all(rank: int) -> None:
    model = network()
    if rank == 1:
        model[2].running_var = torch.ones(1).expand(3)  # cannot be written
    expected = (Exception, "") if rank else (RuntimeError, r"recalibrate stopped because rank 1 failed")
    with failing(model, *expected):
        bn.recalibrate(model, [X], inplace=True)
    model[2].running_var = torch.ones(3)
    bn.recalibrate(model, [X + rank], inplace=True)


def an_interruption_during_an_exchange_waits_for_it(rank: int) -> None:
    model = network()
    if rank == 1:
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    expected = (KeyboardInterrupt, "") if rank else (RuntimeError, "rank 1 failed with KeyboardInterrupt")
    handler = signal.getsignal(signal.SIGINT)
    with failing(model, *expected), Processes("work") as processes:
        if rank == 1:
            interrupt.start()
        else:
            time.sleep(0.6)
        processes.gather(rank)
        processes.gather(rank)
    assert signal.getsignal(signal.SIGINT) is handler


def different_steps_are_an_error(rank: int) -> None:
    with failing(network(), RuntimeError, "work expects the same arguments on every rank, but rank"):  # noqa: SIM117
        with Processes("work") as processes:
            if rank:
                processes.gather(rank)
    with Processes("work") as processes:
        assert processes.gather(rank) == [0, 1]
        processes.check()


def groups_are_checked(rank: int) -> None:
    alone = [dist.new_group([0]), dist.new_group([1])]
    with pytest.raises(ValueError, match="process_group expects a group that includes this process"):
        bn.recalibrate(network(), [X], process_group=alone[1 - rank])
    with pytest.raises(TypeError, match="process_group expects a torch.distributed process group or None, got int"):
        bn.diagnose(network(), process_group=7)
    assert bn.recalibrate(network(), [X], process_group=alone[rank]).report.ranks == 1


def a_sharded_model_runs_in_step(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Conv2d(3, 3, 1), *network())
    fully_shard(model)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match=r"recalibrate expects equally many batches .*, got fewer on rank 0"):
        bn.recalibrate(model, [X] * (1 + rank), inplace=True)
    assert_close(list(model.buffers()), before, rtol=0, atol=0)
    for _ in range(2):
        model(X).sum().backward()


CHECKS: list[Callable[[int], None]] = [
    arguments_are_checked_together,
    a_failure_in_the_data_stops_the_others_at_once,
    a_failure_at_the_end_undoes_all,
    an_interruption_during_an_exchange_waits_for_it,
    different_steps_are_an_error,
    groups_are_checked,
    a_sharded_model_runs_in_step,
]


def test_a_failure_on_one_rank_is_a_failure_on_all(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path, 20)


def dying(rank: int, folder: str) -> None:
    join_group(rank, folder, 20)
    joined = Path(folder, "joined")
    if rank == 1:
        until = time.monotonic() + 20  # the other rank's set-up fails if this process ends before it
        while not joined.exists() and time.monotonic() < until:
            time.sleep(0.01)
        os._exit(0)
    joined.touch()
    with pytest.raises(RuntimeError, match=r"expects all of ranks 0, 1 to call it, but their exchange failed with"):
        bn.recalibrate(network(), [X])
    Path(folder, "told").touch()
    os._exit(0)


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    spawn(dying, (str(tmp_path),))
    assert (tmp_path / "told").exists()


def test_a_process_alone_passes_its_own_failure_on() -> None:
    def block(processes: Processes) -> None:
        assert processes.gather(3) == [3]
        processes.check()
        assert list(processes.in_step(range(3))) == [0, 1, 2]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), Processes("work") as processes:
        block(processes)
