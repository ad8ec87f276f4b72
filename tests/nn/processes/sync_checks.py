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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import reference
from tests.cases import CASES, EPS, Case
from tests.nn.processes.sync_group import PROCESSES, Group, collectives, leaf, network, wide
from tests.tolerance import Terms, assert_within, bound

ONE_VALUE = r"SyncBatchNorm expects more than one value per channel in training over all processes, got one"


# Every number of processes


def every_case_is_one_process_on_the_joined_batch(group: Group) -> None:
    for case in CASES:
        if case.m != 1:
            _case(group, case)


def _case(group: Group, case: Case) -> None:
    joined, dy, (weight, bias) = case.x(), case.random(4), case.parameters()
    forward = reference.forward_training(*map(wide, (joined, weight, bias)), eps=EPS)
    gradients, terms = reference.backward(wide(dy), forward), Terms(forward, None, wide(bias))
    layer = group.layer(case.shape[1], eps=EPS, momentum=1.0)
    layer.weight = None if weight is None else nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    layer.running_mean, layer.running_var = (
        t.to(case.statistics_dtype) for t in (layer.running_mean, layer.running_var)
    )
    x = group.share(joined).requires_grad_()
    y = layer(x)
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(x).stride()), case.id

    def mine(values: np.ndarray) -> np.ndarray:
        return np.array_split(values, group.cuts(case.shape[0]))[group.rank]

    assert_within(y, mine(forward.y), mine(bound(terms.z, case.dtype, forward.y)), f"{case.id}: y")
    y.backward(group.share(dy))
    size = np.abs(wide(dy))
    allowed = bound(terms.dx(size), case.dtype, gradients.dx)
    assert_within(x.grad, mine(gradients.dx), mine(allowed), f"{case.id}: dx")
    sums = terms.sums(size, like=forward.weight)
    expected = (gradients.dbias, gradients.dweight)
    for p, value, sizes, what in zip((layer.bias, layer.weight), expected, sums, ("dbias", "dweight"), strict=True):
        if p is not None:  # each process rounds its part
            rounded = sizes if p.dtype in (torch.float16, torch.bfloat16) else None
            assert_within(group.total(p.grad), value, bound(sizes, p.dtype, rounded), f"{case.id}: {what}")
    if case.m == 0:
        assert layer.num_batches_tracked == 0
        return
    assert layer.num_batches_tracked == 1
    mean, var, kept = forward.mean, forward.var * case.m / (case.m - 1), case.statistics_dtype
    allowed = bound(terms.deviation() + np.abs(mean), kept)
    assert_within(layer.running_mean, mean, allowed, f"{case.id}: running_mean")
    assert_within(layer.running_var, var, bound(var, kept), f"{case.id}: running_var")


def training_under_ddp_is_training_on_the_joined_batch(group: Group) -> None:
    alone, mine = network(bn.BatchNorm2d), network(group.layer)
    parallel = DistributedDataParallel(mine, process_group=group.process_group)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, mine)]
    for step, n in enumerate((12, 9, 16)):  # different parts in each step
        generator = torch.Generator().manual_seed(step)
        x, labels = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 2
        nn.functional.cross_entropy(alone(x), labels).backward()
        share = group.share(labels)
        loss = nn.functional.cross_entropy(parallel(group.share(x)), share, reduction="sum") / max(len(share), 1)
        (loss * (len(share) * group.size / n)).backward()
        for ours, theirs in zip(mine.parameters(), alone.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(mine.state_dict(), alone.state_dict(), rtol=1e-9, atol=1e-11)
    running = group.total(mine[1].running_var)
    assert torch.equal(running, group.size * mine[1].running_var.double())  # the same bits everywhere


def second_derivatives_are_those_of_the_joined_batch(group: Group) -> None:
    alone, mine = bn.BatchNorm2d(3).double(), group.layer(3).double()
    joined, dy = torch.randn(2, 9, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def derivatives(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((layer(x).sin() * dy).sum(), (x, *layer.parameters()), create_graph=True)
        # The gradients of γ and β are parts of a sum, so that only terms that are linear in them add up.
        loss = (first[0].square() * dy).sum() + first[1].dot(alone.running_var) + first[2].sum()
        return [*first, *torch.autograd.grad(loss, (x, *layer.parameters()))]

    expected = derivatives(alone, leaf(joined), dy)
    actual = derivatives(mine, leaf(group.share(joined)), group.share(dy))
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if theirs.dim() == 1:
            assert_close(group.total(ours), theirs, rtol=1e-10, atol=1e-11, msg=lambda text, n=number: f"{n}: {text}")
        else:
            assert_close(ours, group.share(theirs), rtol=1e-10, atol=1e-11, msg=lambda text, n=number: f"{n}: {text}")
    assert mine.num_batches_tracked == 1


def masks_and_weights_count_over_all_processes(group: Group) -> None:
    generator = torch.Generator().manual_seed(2)
    joined, dy = torch.randn(2, 9, 3, 7, dtype=torch.float64, generator=generator)
    weights = torch.rand(9, 7, dtype=torch.float64, generator=generator)
    padding = weights > 0.4
    nothing_on_one = padding.clone()
    nothing_on_one.tensor_split(group.cuts(9))[1][...] = False
    for mask in (padding, weights, nothing_on_one):
        alone, mine = bn.BatchNorm1d(3).double(), group.layer(3).double()
        whole, share = leaf(joined), leaf(group.share(joined))
        expected, y = alone(whole, mask), mine(share, group.share(mask))
        assert_close(y, group.share(expected), rtol=1e-11, atol=1e-11)
        expected.backward(dy)
        y.backward(group.share(dy))
        assert_close(share.grad, group.share(whole.grad), rtol=1e-10, atol=1e-11)
        assert_close(group.total(mine.weight.grad), alone.weight.grad, rtol=1e-10, atol=1e-11)
        assert_close(dict(mine.named_buffers()), dict(alone.named_buffers()), rtol=1e-11, atol=1e-12)
    before = copy.deepcopy(mine.state_dict())
    y = mine(group.share(joined), torch.zeros(1, 1, dtype=torch.bool))
    assert y.isfinite().all()
    assert_close(mine.state_dict(), before, rtol=0, atol=0)


def renormalization_joins_statistics_too(group: Group) -> None:
    joined, dy = torch.randn(2, 9, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.5
    alone = bn.BatchRenorm(3, rmax=1.2, dmax=0.3).double()
    mine = bn.BatchRenorm(3, rmax=1.2, dmax=0.3, sync=True, process_group=group.process_group).double()
    for _ in range(2):
        whole, share = leaf(joined), leaf(group.share(joined))
        expected, y = alone(whole), mine(share)
        assert_close(y, group.share(expected), rtol=1e-11, atol=1e-11)
        expected.backward(dy)
        y.backward(group.share(dy))
        assert_close(share.grad, group.share(whole.grad), rtol=1e-10, atol=1e-11)
        assert_close(group.total(mine.weight.grad), alone.weight.grad, rtol=1e-10, atol=1e-11)
        assert_close(mine.state_dict(), alone.state_dict(), rtol=1e-11, atol=1e-12)


def one_sample_on_each_process_is_enough(group: Group) -> None:
    joined = torch.randn(group.size, 3, generator=torch.Generator().manual_seed(3))
    layer, alone = group.layer(3), bn.BatchNorm1d(3)
    assert_close(layer(joined[group.rank : group.rank + 1]), alone(joined)[group.rank : group.rank + 1])
    assert_close(layer.state_dict(), alone.state_dict())


def one_value_in_all_is_refused_on_every_process(group: Group) -> None:
    layer = group.layer(3)
    message = ""
    try:
        layer(torch.randn(int(group.rank == 1), 3))
    except ValueError as error:
        message = str(error)
    assert message.startswith(ONE_VALUE), message
    assert layer.num_batches_tracked == 0


def one_value_in_all_is_normalized_by_running_statistics(group: Group) -> None:
    layer = group.layer(3, on_single="running")
    layer.running_mean += 2.0
    layer.running_var += 3.0
    x = torch.randn(int(group.rank == 1), 3, requires_grad=True)
    y, expected = layer(x), copy.deepcopy(layer).eval()(x)
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(dx, torch.autograd.grad(expected.square().sum(), x)[0])
    mask = torch.arange(4) == (0 if group.rank == 1 else 4)
    padded = torch.randn(4, 3)
    assert_close(layer(padded, mask), copy.deepcopy(layer).eval()(padded))
    assert layer.num_batches_tracked == 0
    joined = torch.randn(group.size, 3, generator=torch.Generator().manual_seed(3))
    assert_close(layer(joined[group.rank : group.rank + 1]), bn.BatchNorm1d(3)(joined)[group.rank : group.rank + 1])
    assert layer.num_batches_tracked == 1


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


EVERY_SIZE = [
    every_case_is_one_process_on_the_joined_batch,
    training_under_ddp_is_training_on_the_joined_batch,
    second_derivatives_are_those_of_the_joined_batch,
    masks_and_weights_count_over_all_processes,
    renormalization_joins_statistics_too,
    one_sample_on_each_process_is_enough,
    one_value_in_all_is_refused_on_every_process,
    one_value_in_all_is_normalized_by_running_statistics,
]
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
