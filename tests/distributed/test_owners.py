"""Models whose parameters FSDP shards or DDP reduces: changes that would break training raise an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.distributed.owners import check_not_sharded, sharded_modules
from batchnorm.doctor.pytorch.inspection import inspect_layers
from tests.processes import run_checks

SHARDED = r"expects parameters that are whole on every process, got .*shards\. Call .* before sharding, or "
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), bn.BatchRenorm2d(4), nn.Flatten(1)
    )


def fsdp1(model: nn.Module, use_orig_params: bool = True) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def fsdp1_flat(model: nn.Module) -> nn.Module:
    return fsdp1(model, use_orig_params=False)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def gathered(model: nn.Module) -> nn.Module:
    model = fsdp2(model)
    with torch.no_grad():
        model.eval()(X)  # afterwards the parameters of the root are whole tensors
    return model.train()


def step(model: nn.Module, x: Tensor = X) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, x: Tensor = X) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(step(model, x))
        optimizer.step()
    return torch.stack(losses)


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "convert": lambda model: bn.convert(model, bn.GhostBatchNorm, inplace=True, ghost_size=4),
    "convert a copy": lambda model: bn.convert(model, bn.GhostBatchNorm, ghost_size=4),
    "freeze": lambda model: bn.freeze(model, inplace=True),
    "accelerate": lambda model: bn.accelerate(model, X, inplace=True),
    "fold": lambda model: bn.fold(model, X),
    "fold in place": lambda model: bn.fold(model, X, inplace=True),
    "insert": lambda model: bn.insert_batchnorm(model, nn.ReLU, [X], inplace=True),
    "drop": lambda model: bn.drop_redundant_bias(model, inplace=True),
    "recalibrate a copy": lambda model: bn.recalibrate(model, [X]),
    "recalibrate by layers": lambda model: bn.recalibrate(model, [X], passes="sequential", inplace=True),
    "diagnose": lambda model: bn.diagnose(model, [X]),
    "diagnose without data": bn.diagnose,
    "inspect": inspect_layers,
}


def sharded_models_are_left_and_train_on(rank: int) -> None:
    for shard in (fsdp1, fsdp1_flat, fsdp2, gathered):
        model, twin = shard(network()), shard(network())
        for name, verb in VERBS.items():
            before = {path: (type(m), m.training) for path, m in model.named_modules()}
            with pytest.raises(ValueError, match=SHARDED):
                verb(model)
            assert before == {path: (type(m), m.training) for path, m in model.named_modules()}, name
        assert torch.equal(train(model), train(twin)), shard.__name__
        with bn.watch(model, every=1, warn=False) as watch:
            train(model)
        assert watch.history and all(record.dead != record.dead for record in watch.history)  # γ is not whole


def sharded_statistics_are_recalibrated(rank: int) -> None:
    for shard in (fsdp1, fsdp1_flat, fsdp2):
        model, x = shard(network()), X + rank
        bn.recalibrate(model, [x, x], inplace=True)
        expected = bn.recalibrate(network(), [X, X, X + 1, X + 1], synchronize=False).model
        buffers = {name.replace("_fsdp_wrapped_module.", ""): b for name, b in model.named_buffers()}
        assert_close(buffers, dict(expected.named_buffers()), msg=shard.__name__)
        twin = shard(network())
        twin(X)
        hooks = [[len(h) for n, h in vars(m).items() if "_hooks" in n] for m in (*model.modules(), *twin.modules())]
        assert hooks[: len(hooks) // 2] == hooks[len(hooks) // 2 :]  # the hooks that FSDP installs in its first forward
        train(model)


def training_is_the_same_sharded_and_reduced(rank: int) -> None:
    def reduced(model: nn.Module) -> nn.Module:
        return DDP(model, broadcast_buffers=False)

    mine, results = X[rank * 4 : rank * 4 + 4], []
    for wrap in (reduced, fsdp1, fsdp2):
        model = wrap(network())
        results.append((train(model, mine), list(model.buffers()), step(model)))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def parts_of_a_sharded_model_are_known(rank: int) -> None:
    part = fsdp1(network()).module
    with pytest.raises(ValueError, match=SHARDED):
        bn.freeze(part, inplace=True)
    model = nn.Sequential(fsdp2(network()), nn.BatchNorm1d(64))
    assert sharded_modules(model).keys() == set(model[0].modules())
    check_not_sharded("convert", model, [("1", model[1])])
    bn.freeze(model, only="1", inplace=True)
    assert isinstance(model[1], bn.FrozenBatchNorm)
    with pytest.raises(ValueError, match=r"freeze expects .* got '0\.1' \(BatchNorm2d\), whose parameters fully_shard"):
        bn.freeze(model, only="0.*", inplace=True)


def a_tensor_parallel_model_is_known(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    parallelize_module(model, dist.init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=SHARDED):
        bn.fold(model, torch.randn(4, 4))
    bn.convert(model, bn.BatchRenorm, inplace=True)  # its own parameters are whole


def ddp_keeps_reducing_every_parameter(rank: int) -> None:
    def other_share(model: nn.Module) -> list[Tensor]:
        train(model, X[rank * 4 : rank * 4 + 4])
        return [p.detach().clone() for p in model.parameters()]

    model, direct = DDP(network()), network()
    bn.convert(model, bn.GhostBatchNorm, inplace=True, ghost_size=4)
    bn.convert(direct, bn.GhostBatchNorm, inplace=True, ghost_size=4)
    assert_close(other_share(model), other_share(DDP(direct)), rtol=0, atol=0)
    refused = {
        "freeze": r"freeze expects to keep the parameters .* that stops training '1\.weight'.*find_unused_parameters",
        "insert": r"insert_batchnorm expects to keep the parameters .* that adds the parameter '2\.1\.weight'",
        "drop": r"drop_redundant_bias expects a model that is not yet in DistributedDataParallel",
    }
    for name, message in refused.items():
        model = DDP(network())
        state, layers = copy.deepcopy(model.state_dict()), list(model.modules())
        with pytest.raises(ValueError, match=message):
            VERBS[name](model)
        assert layers == list(model.modules())
        assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert all(p.requires_grad for p in model.parameters())
        other_share(model)
    model = DDP(network(), find_unused_parameters=True)
    bn.freeze(model, inplace=True)
    γ = model.module[1].weight.clone()
    other_share(model)
    assert torch.equal(model.module[1].weight, γ)
    model = DDP(bn.freeze(network()).model)
    with pytest.raises(ValueError, match=r"unfreeze expects to keep .* that adds the parameter '1\.weight'"):
        bn.unfreeze(model, inplace=True)
    other_share(model)


def ddp_models_train_after_a_diagnosis(rank: int) -> None:
    model, twin = DDP(network()), DDP(network())
    for each in (model, twin):
        step(each), each.zero_grad()
    bn.diagnose(model, [X, X])
    with pytest.raises(RuntimeError):
        bn.diagnose(model, [X, X[:, :2]])
    assert torch.equal(train(model), train(twin))


CHECKS = [
    sharded_models_are_left_and_train_on,
    sharded_statistics_are_recalibrated,
    training_is_the_same_sharded_and_reduced,
    parts_of_a_sharded_model_are_known,
    a_tensor_parallel_model_is_known,
    ddp_keeps_reducing_every_parameter,
    ddp_models_train_after_a_diagnosis,
]


def test_wrappers_notice_every_change_or_refuse_it(tmp_path: Path) -> None:
    run_checks(CHECKS, tmp_path, 60)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch.compile
@pytest.mark.parametrize("wrap", ["compiled", "compiled in place", "data parallel"])
def test_other_wrappers_see_the_new_layers(wrap: str) -> None:
    def wrapped(model: nn.Module) -> nn.Module:
        if wrap == "data parallel":
            return nn.DataParallel(model)
        if wrap == "compiled":
            return torch.compile(model, backend="eager")
        model.compile(backend="eager")
        return model

    for name in ("convert", "convert a copy", "freeze", "accelerate", "insert", "drop"):
        torch._dynamo.reset()
        model, plain = wrapped(network()), network()
        step(model), step(plain)
        found, expected = VERBS[name](model).model, VERBS[name](plain).model
        assert_close(found(X), expected(X))
