"""Checks that every number of processes passes: together they compute one process on the joined batch."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batchnorm as bn
from batchnorm import reference
from tests.cases import CASES, EPS, Case
from tests.nn.processes.sync_group import Group, leaf, network, wide
from tests.tolerance import Terms, assert_within, bound

ONE_VALUE = r"SyncBatchNorm expects more than one value per channel in training over all processes, got one"


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
