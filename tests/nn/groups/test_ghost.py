"""Ghost batch normalization: each part as a batch of its own, one update for all."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batchnorm import nn, reference
from batchnorm.nn.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d
from tests.cases import CASES, EPS, Case, ids
from tests.tolerance import Terms, assert_within, bound

# torch loads its forward-mode formulas through its own deprecated compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

# Of N samples with one value each, of N with several: parts of these sizes.
PARTS = [
    ((8, 3), 4, [4, 4]),
    ((9, 3), 4, [4, 5]),
    ((10, 3), 4, [4, 4, 2]),
    ((4, 3), 4, [4]),
    ((5, 3), 4, [5]),
    ((3, 3), 4, [3]),
    ((9, 3, 5), 4, [4, 4, 1]),
    ((3, 3, 4, 5), 1, [1, 1, 1]),
    ((9, 3, 1, 1), 4, [4, 5]),
    ((7, 3, 2, 2, 2), 3, [3, 3, 1]),
]


def wide(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy().copy()


@pytest.mark.parametrize(("shape", "size", "parts"), PARTS, ids=str)
def test_each_part_is_a_batch_of_its_own(shape: tuple[int, ...], size: int, parts: list[int]) -> None:
    ghost = GhostBatchNorm(3, ghost_size=size, dtype=torch.float64)
    plain = nn.BatchNorm(3, dtype=torch.float64)
    for p, q in zip(ghost.parameters(), plain.parameters(), strict=True):
        torch.nn.init.uniform_(p)
        q.data.copy_(p)
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    outcomes = []
    for f in (ghost, lambda x: torch.cat([plain(part) for part in x.split(parts)])):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(dy)
        outcomes.append([y, leaf.grad])
    outcomes[0] += [p.grad for p in ghost.parameters()]
    outcomes[1] += [p.grad for p in plain.parameters()]
    assert_close(*outcomes, rtol=1e-11, atol=1e-12)

    assert ghost.num_batches_tracked == 1
    channels = [part.transpose(0, 1).flatten(1) for part in x.split(parts)]
    assert_close(ghost.running_mean, 0.1 * torch.cat(channels, 1).mean(1))
    squares = sum(part.var(1, correction=0) * part.shape[1] for part in channels)
    assert_close(ghost.running_var, 0.9 + 0.1 * squares / sum(part.shape[1] - 1 for part in channels))


def test_equal_parts_update_the_variance_by_the_mean_of_their_variances() -> None:
    layer = GhostBatchNorm1d(2, ghost_size=4, momentum=1.0, dtype=torch.float64)
    x = torch.randn(12, 2, dtype=torch.float64) + torch.arange(12.0).view(-1, 1)  # a spread between the parts too
    layer(x)
    assert_close(layer.running_var, torch.stack([part.var(0) for part in x.split(4)]).mean(0))


@pytest.mark.parametrize("kind", ["alone", "boolean", "weights"])
@pytest.mark.parametrize("case", [c for c in CASES if c.m > 4 and c.affine == "both" and c.shape[0] > 1], ids=ids)
def test_agrees_with_the_reference(case: Case, kind: str) -> None:
    n = case.shape[0]
    size = max(2, n // 3) if case.m == n else (n + 1) // 2
    dtype = case.dtype if case.half_parameters else case.statistics_dtype
    layer = GhostBatchNorm(case.shape[1], momentum=0.3, ghost_size=size, dtype=dtype)
    with torch.no_grad():
        for own, given in zip(layer.parameters(), case.parameters(), strict=True):
            own.copy_(given)
        for own, given in zip((layer.running_mean, layer.running_var), case.running(), strict=True):
            own.copy_(given)
    old = {name: wide(t) for name, t in layer.state_dict().items() if t.dim()}
    mask = None
    if kind != "alone":
        generator = torch.Generator().manual_seed(9)
        mask = torch.rand(n, *case.shape[2:], generator=generator) < 0.7
        mask.view(n, -1)[:, :2] = True
        if kind == "weights":
            mask = mask * torch.empty(mask.shape).uniform_(0.2, 3.0, generator=generator)
    x, dy = case.x().requires_grad_(), case.random(4)
    y = layer(x, mask)
    y.backward(dy)

    index = reference.ghost_index(wide(x), size)
    rows = {"index": index, "groups": index.max() + 1, "eps": EPS}
    affine = [np.broadcast_to(old[name], (rows["groups"], case.shape[1])) for name in ("weight", "bias")]
    expected = reference.forward_training(wide(x), *affine, weights=wide(mask), **rows)
    terms = Terms(expected, None, affine[1])
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    assert_within(y, expected.y, bound(terms.z, case.dtype, expected.y), "y")
    backward, dz = reference.backward(wide(dy), expected), np.abs(wide(dy))
    assert_within(x.grad, backward.dx, bound(terms.dx(dz), case.dtype, backward.dx), "dx")
    sum_dz, sum_dz_xhat = (t.sum(0) for t in terms.sums(dz, like=expected.weight))
    dweight, dbias = backward.dweight.sum(0), backward.dbias.sum(0)
    assert_within(layer.weight.grad, dweight, bound(sum_dz_xhat, dtype, dweight), "dγ")
    assert_within(layer.bias.grad, dbias, bound(sum_dz, dtype, dbias), "dβ")
    running = reference.update_running(
        old["running_mean"], old["running_var"], reference.pool(expected.batch), momentum=0.3, convention="torch"
    )
    mean_terms = np.abs(old["running_mean"]) + np.abs(running.mean) + terms.deviation().max(0)
    assert_within(layer.running_mean, running.mean, bound(mean_terms, dtype, running.mean), "running_mean")
    assert_within(layer.running_var, running.var, bound(running.var, dtype, running.var), "running_var")


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_first_and_second_derivatives_and_forward_mode(masked: bool) -> None:
    layer = GhostBatchNorm(2, ghost_size=2, dtype=torch.float64)
    layer.update_running_stats = False
    mask = torch.rand(5, 3) < 0.7 if masked else None
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, mask))

    inputs = (x, *(torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_masked_parts_agree_with_the_same_values_packed() -> None:
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    mask = torch.rand(9, 4) < 0.6
    mask[3:6] = False  # a part of which nothing counts
    layer, plain = GhostBatchNorm1d(2, ghost_size=3, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64)
    y = layer(x, mask)
    assert y.isfinite().all()
    packed = [part.movedim(1, -1)[counted] for part, counted in zip(x.split(3), mask.split(3), strict=True)]
    for part, counted, values in zip(y.split(3), mask.split(3), packed, strict=True):
        if len(values):
            assert_close(part.movedim(1, -1)[counted], plain(values), rtol=1e-11, atol=1e-12)
    values = [values for values in packed if len(values)]
    squares = sum(v.var(0, correction=0) * len(v) for v in values)
    assert_close(layer.running_var, 0.9 + 0.1 * squares / sum(len(v) - 1 for v in values))
    assert_close(layer.running_mean, 0.1 * torch.cat(values).mean(0))
    before = copy.deepcopy(dict(layer.state_dict()))
    layer(x, torch.zeros_like(mask))
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def test_a_batch_of_one_part_is_ordinary_bit_for_bit_in_its_statistics() -> None:
    x = torch.randn(8, 3, 5, 5)
    ghost, plain = GhostBatchNorm2d(3, ghost_size=8), nn.BatchNorm2d(3)
    assert_close(ghost(x), plain(x))
    assert_close(ghost.state_dict(), plain.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("shape", [(4, 5), ()], ids=["image", "vector"])
def test_one_compiled_graph_takes_every_batch_size(shape: tuple[int, ...], backend: str) -> None:
    torch._dynamo.reset()
    plain = GhostBatchNorm(3, ghost_size=4, dtype=torch.float64)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 10, 7, 30):
            x = torch.randn(n, 3, *shape, dtype=torch.float64)
            outcomes = []
            for call, module in ((plain, plain), (compiled, layer)):
                module.zero_grad()
                leaf = x.clone().requires_grad_()
                y = call(leaf)
                y.pow(3).sum().backward()
                outcomes.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
            assert_close(outcomes[1], outcomes[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ghost_size": 0}, ValueError, r"GhostBatchNorm2d expects ghost_size >= 1, got 0"),
        ({"ghost_size": 2.0}, TypeError, r"GhostBatchNorm2d expects ghost_size to be an int, got 2.0 \(float\)"),
    ],
)
def test_a_wrong_argument_raises_an_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GhostBatchNorm2d(3, **options)


def test_parts_of_one_value_are_refused() -> None:
    layer = GhostBatchNorm1d(3, ghost_size=1)
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d expects more than one value per channel and ghost batch"):
        layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d expects more than one value per channel in training"):
        layer(torch.randn(1, 3))
    assert layer.num_batches_tracked == 0
    layer(torch.randn(4, 3, 2))


def test_description_shows_the_size() -> None:
    assert repr(GhostBatchNorm2d(3, ghost_size=16)).endswith("track_running_stats=True, ghost_size=16)")
