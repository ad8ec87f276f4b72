"""The bits of a channel depend neither on the number of threads nor on the values of other channels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.ops import compiled, strict
from tests.ops import implementations
from tests.ops.implementations import Ops

# Few and many channels, short and long rows; enough values for several threads.
SHAPES = [(16, 64, 8, 8), (8, 3, 40, 40), (30, 130, 3, 3), (600, 64)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def placed(x: Tensor, layout: str) -> Tensor:
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def far_from_its_pivot(x: Tensor) -> None:
    """Shift every eighth sample; the pivot is computed from these samples."""
    x[::8] += 1000.0


def neighbours(x: Tensor, channel: int) -> Iterator[Tensor]:
    """Yield x with the same values in one channel, and other values in the others."""
    others = [c for c in range(x.shape[1]) if c != channel]
    for value in (torch.nan, torch.inf, 0.0 if x.dtype == torch.float16 else 5e18):
        changed = x.clone()
        changed[3, others] = value
        yield changed
    changed = x.clone()
    for c in others:
        far_from_its_pivot(changed[:, c])
    yield changed


def results(op: Ops, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The results of every operator that sums."""
    n, c = x.shape[:2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = torch.linspace(-1, 1, c, dtype=wide), torch.linspace(0, 1, c, dtype=wide)
    attributes = (1e-5, "silu", 0.0)
    y, *statistics = op("train_forward")(x, weight, bias, None, *attributes)
    backward = op("train_backward")(dy, x, None, None, *statistics, weight, bias, *attributes, False)[:3]
    index, weights = torch.arange(n) % 3, (torch.arange(x[:, 0].numel()) % 5).reshape(n, *x.shape[2:]).to(wide)
    found = [y, *statistics, *backward]
    for chosen, weighing, groups in ((None, None, 1), (None, weights, 1), (index, None, 3), (index, weights, 3)):
        found += op("moments")(x, chosen, weighing, groups)[1:]
    kept = (dy, x, None, None, *statistics, weight, bias)
    found += op("normalize_backward")(*kept, index, 3, *attributes, False)[:3]
    if strict.takes_parts(x):  # only the compiled part has these operators
        for shared in (False, True):
            y, count, *statistics, _ = strict.parts_forward(x, weight, bias, None, index, None, 3, shared, *attributes)
            kept = (dy, x, None, None, *statistics, weight, bias, count)
            found += [y, *statistics, *strict.parts_backward(*kept, index, None, 3, *attributes, False)[:3]]
    return found


def channel_of(t: Tensor, channel: int, channels: int) -> Tensor:
    """The bits of one channel of `[N, C, *S]`, `[C]` or `[K, C]`; NaN equals NaN."""
    at = 1 if t.dim() >= 2 else 0
    assert t.shape[at] == channels
    return t.select(at, channel).contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


CASES = [
    (name, shape, layout, dtype)
    for name in (implementations.names()[:2] if compiled.cpu_capabilities() else ["eager"])
    for shape in SHAPES
    for layout in ("contiguous", "channels_last")
    for dtype in DTYPES
    if name != "eager" or (shape, layout, dtype) == (SHAPES[1], "contiguous", torch.float32)  # slower, and one code
] + [("eager", (40_000, 1), "contiguous", torch.float32)]  # torch divides such a sum among threads


@pytest.mark.parametrize(("name", "shape", "layout", "dtype"), CASES, ids=str)
def test_a_channel_has_the_same_bits(name: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    channels, channel = shape[1], shape[1] - 1
    x, dy = (placed(torch.randn(shape, dtype=torch.float64), layout).to(dtype) for _ in range(2))
    x += 3.3
    if shape[1] > 3:
        far_from_its_pivot(x[:, 0])
    with implementations.chosen(name) as op:
        torch.set_num_threads(1)
        expected = results(op, x, dy)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for ours, theirs in zip(results(op, x, dy), expected, strict=True):
                assert torch.equal(ours, theirs)
        for i, beside in enumerate(neighbours(x, channel)):
            torch.set_num_threads(1 + i % 3)
            for ours, theirs in zip(results(op, beside, dy), expected, strict=True):
                assert torch.equal(channel_of(ours, channel, channels), channel_of(theirs, channel, channels))


@pytest.mark.skipif(not compiled.cpu_capabilities(), reason="no compiled operators in this build")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 64, 8, 8), (32, 3, 32, 32), (2, 130, 64), (2, 130, 9)], ids=str)
def test_a_channel_alone_has_the_bits_that_it_has_beside_others(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    for c in range(0, shape[1], 2):
        far_from_its_pivot(x[:, c])
    x[::8, 1::2] += 3.0  # not far, but another pivot would give other bits
    kind, stored = BatchNorm1d if len(shape) == 3 else BatchNorm2d, torch.float64 if dtype == torch.float64 else None
    layer, alone = kind(shape[1], dtype=stored), kind(1, dtype=stored)
    for c in (0, 1, shape[1] - 1):
        whole, own = x.clone().requires_grad_(), x[:, c : c + 1].clone().requires_grad_()
        torch.set_num_threads(1 + c % 2)
        y, y_alone = layer(whole), alone(own)
        y.backward(dy)
        y_alone.backward(dy[:, c : c + 1])
        assert torch.equal(y[:, c : c + 1], y_alone)
        assert torch.equal(whole.grad[:, c : c + 1], own.grad)
        layer.zero_grad()
