"""SyncBatchNorm: BatchNorm on one process, the joined batch on several, and failures that name the layer on all."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.nn.sync import SyncBatchNorm
from tests.nn.processes import sync_checks
from tests.processes import spawn

# Alone


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def assert_is_batch_norm(layer: SyncBatchNorm) -> None:
    plain = bn.BatchNorm2d(3)
    for training in (True, False):
        x = torch.randn(4, 3, 5, 5)
        outcomes = []
        for module in (layer, plain):
            leaf = x.clone().requires_grad_()
            y = module.train(training)(leaf)
            y.square().sum().backward()
            outcomes.append([y, leaf.grad, module.weight.grad, *module.buffers()])
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_without_a_group_it_is_batch_norm() -> None:
    assert not dist.is_initialized()
    assert_is_batch_norm(SyncBatchNorm(3))


def test_one_process_is_batch_norm(one_process: Any) -> None:
    assert_is_batch_norm(SyncBatchNorm(3))
    assert_is_batch_norm(SyncBatchNorm(3, process_group=one_process))
    with pytest.raises(ValueError, match=r"SyncBatchNorm expects more than one value per channel in training, got x"):
        SyncBatchNorm(3)(torch.randn(1, 3))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (2, 3, 2, 2, 2, 2)], ids=str)
def test_it_takes_every_rank(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(SyncBatchNorm(3)(x), bn.BatchNorm(3)(x))


def test_it_is_torchs_in_arguments_and_state_but_not_in_class() -> None:
    ours = SyncBatchNorm(3, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    theirs = torch.nn.SyncBatchNorm(3, 1e-3, 0.2, True, True, None, "cpu", torch.float64)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(ours, torch.nn.SyncBatchNorm)  # which DDP refuses on the CPU
    assert (ours.eps, ours.momentum, ours.process_group) == (theirs.eps, theirs.momentum, theirs.process_group)


def test_copies_are_equal() -> None:
    layer = SyncBatchNorm(3, name="a.b", bias=False, on_nonfinite="skip")
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        assert_close(again.state_dict(), layer.state_dict())


def test_other_values_than_a_group_are_refused(one_process: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group expects a torch.distributed process group or None, got str"):
        SyncBatchNorm(3, process_group="0")
    with pytest.raises(ValueError, match=r"process_group expects a group that includes this process"):
        SyncBatchNorm(3, process_group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_group_that_is_gone_is_named(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    layer = SyncBatchNorm(3, process_group=dist.group.WORLD)
    name = layer.process_group.group_name
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=rf"process group {name!r} expects torch.distributed to be initialized"):
        layer(torch.randn(4, 3))
    layer._group_name = "elsewhere"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/other", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"process group 'elsewhere' expects that group in this process"):
            layer(torch.randn(4, 3))
        layer.process_group = None
        layer(torch.randn(4, 3))
    finally:
        dist.destroy_process_group()


def test_mistakes_raise_the_same_errors_as_in_other_layers() -> None:
    with pytest.raises(
        ValueError, match=r"SyncBatchNorm expects x of shape \[N, C, \*\], got \[3, 4, 5\]|num_features"
    ):
        SyncBatchNorm(7)(torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"SyncBatchNorm expects eps > 0"):
        SyncBatchNorm(3, eps=0.0)


# Together


def test_several_processes_are_one(tmp_path: Path) -> None:
    processes = spawn(sync_checks.run, (str(tmp_path),), nprocs=sync_checks.PROCESSES, join=False).processes
    for process in processes:
        process.join()
    failures = "\n".join(path.read_text() for path in sorted(tmp_path.glob("failure*.txt")))
    assert not failures, failures
    for rank in range(sync_checks.PROCESSES):
        done = (tmp_path / f"done{rank}.txt").read_text().splitlines()
        assert len(done) == sum(
            len(sync_checks.EVERY_SIZE) + len(more) for size, more in sync_checks.OF_SIZE.items() if rank < size
        )


# Errors


def failing(rank: int, folder: str) -> None:
    """Run every kind of failure on one of three processes, and store the error."""
    torch.set_num_threads(1)
    started = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=started)
    ways = [other_channels, other_layer, other_branch, death]
    groups = [dist.new_group([0, 1, 2], timeout=timedelta(seconds=20 if way is death else 4)) for way in ways]
    last = dist.new_group([0, 1], timeout=timedelta(seconds=20))
    x = torch.randn(4, 8, requires_grad=True)
    messages = {}
    for way, group in zip([*ways, skipped_layer], [*groups, last], strict=True):
        layers = [
            SyncBatchNorm(channels, process_group=group, name=name)
            for name, channels in (("net.a", 8), ("net.b", 8), ("net.c", 16))
        ]
        text = ""
        try:
            way(rank, layers, x)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        messages[way.__name__] = text
        Path(folder, f"messages{rank}.json").write_text(json.dumps(messages))
        until = time.monotonic() + 60  # for the slower ones: nobody leaves a group that others still talk in
        if way in ways[:-1]:
            Path(folder, f"{way.__name__}{rank}").touch()
            while not all(Path(folder, f"{way.__name__}{other}").exists() for other in range(3)):
                assert time.monotonic() < until
                time.sleep(0.01)
    os._exit(0)  # the groups are broken: nothing can be put away in order


def other_channels(rank: int, layers: list[SyncBatchNorm], x: torch.Tensor) -> None:
    a, _, c = layers
    c(torch.cat([x, x], 1)) if rank == 1 else a(x)


def other_layer(rank: int, layers: list[SyncBatchNorm], x: torch.Tensor) -> None:
    a, b, _ = layers
    b(a(x))
    b(x) if rank == 1 else a(x)


def other_branch(rank: int, layers: list[SyncBatchNorm], x: torch.Tensor) -> None:
    a, b, _ = layers
    branches = [a(x), b(x)]
    (branches[0] if rank == 1 else branches[0] + branches[1]).sum().backward()


def death(rank: int, layers: list[SyncBatchNorm], x: torch.Tensor) -> None:
    y = layers[0](x)
    if rank == 2:
        os._exit(7)
    y.sum().backward()


def skipped_layer(rank: int, layers: list[SyncBatchNorm], x: torch.Tensor) -> None:
    a, _, c = layers
    wide = torch.cat([x, x], 1)
    a(x), c(wide)
    a(x) if rank == 1 else c(wide)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("failing")
    processes = spawn(failing, (str(folder),), nprocs=3, join=False).processes
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, -signal.SIGABRT, 7]  # gloo's own, where sizes differ
    return [json.loads((folder / f"messages{rank}.json").read_text()) for rank in range(3)]


def test_a_failure_on_one_process_names_layer_and_ranks_on_all(messages: list[dict[str, str]]) -> None:
    a, b, c = "SyncBatchNorm(8) 'net.a'", "SyncBatchNorm(8) 'net.b'", "SyncBatchNorm(16) 'net.c'"

    def assert_message(way: Callable[..., None], rank: int, layer: str, *texts: str, phase: str = "moments") -> None:
        text = messages[rank][way.__name__]
        head = (
            f"RuntimeError: {layer} on rank {rank} expects all of ranks {'0, 1' if way is skipped_layer else '0, 1, 2'}"
        )
        assert text.startswith(f"{head} to exchange {phase} with it, but "), text
        for part in texts:
            assert re.search(part, text), text

    for rank in (0, 2):
        # The first process waits for the others, and leaves a message only if its collective fails.
        assert_message(other_channels, rank, a, rf"([Rr]ank 1 failed in|rank 1 is in) {re.escape(c)}\.")
        assert_message(other_layer, rank, a, "others sent those of another layer", re.escape(f"Rank 1 failed in {b}."))
        assert_message(
            other_branch,
            rank,
            b,
            "another layer or another call",
            re.escape(f"Rank 1 failed in {a}."),
            phase="gradients",
        )
    assert_message(other_channels, 1, c, rf"rank (0|2) is in {re.escape(a)}|Rank (0|2) failed in {re.escape(a)}")
    assert_message(other_layer, 1, b, re.escape(f"Rank 0 failed in {a}."), re.escape(f"Rank 2 failed in {a}."))
    assert_message(other_branch, 1, a, re.escape(f"Rank 0 failed in {b}."), phase="gradients")
    for rank in (0, 1):
        assert_message(
            death, rank, a, "No report from rank 2: it died, still waits, or is elsewhere", phase="gradients"
        )
    assert_message(skipped_layer, 0, c, "No report from rank 1")
