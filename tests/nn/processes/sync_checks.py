"""Checks by several processes, each with its own part of the batch; `test_sync` starts them."""

from __future__ import annotations

import copy
import io
import itertools
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import reference
from tests.cases import EPS
from tests.nn.processes.sync_group import PROCESSES, Group, collectives, leaf
from tests.nn.processes.sync_joined import EVERY_SIZE
from tests.tolerance import Terms, assert_within, bound


def compiled_layers_do_what_eager_ones_do(group: Group, backend: str) -> None:
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Conv2d(3, 4, 1), group.layer(4, name="first"), nn.ReLU(), group.layer(4, momentum=None))
    eager = eager.double()
    again = copy.deepcopy(eager)
    compiled = torch.compile(again, backend=backend, fullgraph=True)
    for n in (9,) if backend == "inductor" else (9, 11):
        x, dy = torch.randn(2, n, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        dy = torch.cat([dy, dy[:, :1]], 1)
        inputs = [leaf(group.share(x)) for _ in range(2)]
        y, expected = compiled(inputs[0]), eager(inputs[1])
        assert_close(y, expected, rtol=1e-11, atol=1e-12)
        y.backward(group.share(dy))
        expected.backward(group.share(dy))
        assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-11)
        for ours, theirs in zip(again.parameters(), eager.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
        assert_close(again.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)


# Two processes


def there_is_one_collective_in_forward_and_one_in_backward(group: Group) -> None:
    layer = group.layer(3)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    compiled(x).sum().backward()
    for call in (layer, compiled):
        with collectives() as forward:
            y = call(x)
        with collectives() as backward:
            y.sum().backward()
        assert (forward, backward) == ({"gloo:all_gather": 1}, {"gloo:all_reduce": 1}), (forward, backward)
    with collectives() as backward:  # γ and β alone need no sums
        layer(x.detach()).sum().backward()
    assert backward == {"gloo:all_gather": 1}
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), group.layer(3)), process_group=group.process_group)
    with collectives() as plain, model.no_sync():
        model(x[..., 0, 0]).sum().backward()
    del plain["gloo:broadcast"]  # DDP's, of the buffers
    assert plain == {"gloo:all_gather": 1, "gloo:all_reduce": 1}, plain


def evaluation_communicates_nothing(group: Group) -> None:
    layer, without = group.layer(3), group.layer(3, track_running_stats=False)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    layer(x)
    if group.rank == 0:  # alone: it would wait for the other
        for module in (layer, without):
            alone = bn.BatchNorm2d(3, track_running_stats=module is layer)
            alone.load_state_dict(module.state_dict())
            y = module.eval()(x)
            assert torch.equal(y, alone.eval()(x))
            y.sum().backward()


def dtypes_may_differ_between_processes(group: Group) -> None:
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64) + 3
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for pair in itertools.permutations(dtypes, 2):
        shares = [share.to(dtype) for share, dtype in zip(full.split(4), pair, strict=True)]
        joined = torch.cat([share.double() for share in shares])
        forward = reference.forward_training(joined.numpy(), None, None, eps=EPS)
        terms, dy = Terms(forward, None, None), np.abs(joined.numpy()) % 1.0
        dtype, rows = pair[group.rank], slice(4 * group.rank, 4 * group.rank + 4)
        layer = group.layer(3, affine=False, momentum=1.0)
        layer = layer.double() if dtype == torch.float64 else layer
        x = leaf(shares[group.rank])
        y = layer(x)
        assert y.dtype == dtype
        # The other process's sums, too, are in its dtype.
        allowed = bound(terms.z, torch.float32) + bound(terms.z, dtype, forward.y)
        assert_within(y, forward.y[rows], allowed[rows], f"{pair}: y")
        rounded = torch.from_numpy(dy).to(torch.bfloat16)  # a value of every dtype
        y.backward(rounded[rows].to(dtype))
        gradients = reference.backward(rounded.double().numpy(), forward)
        size = terms.dx(rounded.double().numpy())
        allowed = bound(size, torch.float32) + bound(size, dtype, gradients.dx)
        assert_within(x.grad, gradients.dx[rows], allowed[rows], f"{pair}: dx")
        var = forward.var * 48 / 47
        assert_within(layer.running_var, var, bound(var, torch.float32), f"{pair}: running_var")


def autocast_trains_in_half(group: Group) -> None:
    model = nn.Sequential(nn.Linear(3, 4), group.layer(4))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(5, 3))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[1].running_var.dtype == model[0].weight.grad.dtype == torch.float32


def checkpointing_moves_statistics_once(group: Group) -> None:
    for reentrant in (True, False):
        plain = nn.Sequential(nn.Conv2d(3, 4, 1), group.layer(4), nn.ReLU(), group.layer(4)).double()
        block = copy.deepcopy(plain)
        for step in (1, 2):
            x, dy = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 4, 5, 5).double()
            results = []
            for module, call in ((plain, plain), (block, partial(checkpoint, block, use_reentrant=reentrant))):
                module.zero_grad()
                start = leaf(x)
                y = call(start)
                y.backward(dy)
                results.append([y.detach(), start.grad, *(p.grad.clone() for p in module.parameters())])
            assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
            assert_close(block.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
            assert block[1].num_batches_tracked == step


def transforms_and_forward_mode_differentiate(group: Group) -> None:
    joined, other = torch.randn(2, 8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x, t = group.share(joined), group.share(other)
    layer, alone = group.layer(3).double(), bn.BatchNorm1d(3).double()
    layer.update_running_stats = alone.update_running_stats = False
    gradient = torch.func.grad(lambda x: (layer(x).sin() * t).sum())(x)
    expected = torch.func.grad(lambda x: (alone(x).sin() * other).sum())(joined)
    assert_close(gradient, group.share(expected), rtol=1e-11, atol=1e-12)
    _, tangent = torch.func.jvp(layer, (x,), (t,))
    assert_close(tangent, group.share(torch.func.jvp(alone, (joined,), (other,))[1]), rtol=1e-11, atol=1e-12)


def what_is_not_finite_on_one_process_is_skipped_on_all(group: Group) -> None:
    layer = group.layer(3, on_nonfinite="skip")
    x = torch.randn(4, 3)
    layer(x / (group.rank - 1.0))  # by zero
    assert layer.num_batches_tracked == 0
    assert layer.running_var.isfinite().all()


def what_is_not_finite_on_one_process_raises_on_all(group: Group) -> None:
    layer = group.layer(3, on_nonfinite="error")
    x = torch.randn(4, 3)
    message = ""
    try:
        layer(x / (group.rank - 1.0))
    except FloatingPointError as error:
        message = str(error)
    assert "in 3 of 3 channels (0, 1, 2)" in message, message
    assert layer.num_batches_tracked == 0
    layer(x)
    assert layer.num_batches_tracked == 1


def copies_keep_the_group(group: Group) -> None:
    layer = group.layer(3, name="a.b")
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert again.process_group == group.process_group
        assert again.name == "a.b"
        x = torch.randn(3, 3) + group.rank
        again(x)
        assert_close(again.running_mean, group.total(0.1 * x.mean(0)).float() / 2)
    assert repr(layer) == (
        "SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        f"process_group={group.process_group.group_name!r}, name='a.b')"
    )


OF_SIZE = {
    2: [
        partial(compiled_layers_do_what_eager_ones_do, backend="inductor"),
        there_is_one_collective_in_forward_and_one_in_backward,
        evaluation_communicates_nothing,
        dtypes_may_differ_between_processes,
        autocast_trains_in_half,
        checkpointing_moves_statistics_once,
        transforms_and_forward_mode_differentiate,
        what_is_not_finite_on_one_process_is_skipped_on_all,
        what_is_not_finite_on_one_process_raises_on_all,
        copies_keep_the_group,
    ],
    3: [partial(compiled_layers_do_what_eager_ones_do, backend="aot_eager")],
    4: [],
}


def _name(check: Any) -> str:
    return check.func.__name__ if isinstance(check, partial) else check.__name__


def run(rank: int, folder: str) -> None:
    """Run every check, and store the failures."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120))
    done, groups = [], [Group(size) for size in (2, 3, 4)]
    try:
        for group in groups[max(rank - 1, 0) :]:
            for check in EVERY_SIZE + OF_SIZE[group.size]:
                torch.manual_seed(0)
                done.append(f"{_name(check)} ({group.size} processes)")
                check(group)
        dist.barrier()
    except Exception:
        Path(folder, f"failure{rank}.txt").write_text(f"rank {rank}, {done[-1]}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    Path(folder, f"done{rank}.txt").write_text("\n".join(done))
