"""How tensors are cut into programs."""

from __future__ import annotations

import math

import pytest

from batchnorm.ops.triton.plan import SETTINGS, Plan, at_once, power_of_two, streamed

SHAPES = [
    (32, 64, 12544), (32, 256, 3136), (256, 512, 49), (32, 2048, 49), (4096, 1024, 1), (1, 1, 1), (2, 1, 40_000),
    (70_000, 3, 1), (1, 4096, 7), (3, 1, 2**30), (2**31 + 1, 1, 1), (100_000, 3, 50), (1, 1, 2**32), (2**20, 3, 2**10),
]  # fmt: skip


def covered(p: Plan) -> int:
    """Values that the plan's splits go over, padding left out."""
    if p.rows:
        assert p.blocks * p.b1 >= p.channels
        assert (p.splits - 1) * p.per < p.size0 <= p.splits * p.per
    else:
        assert p.blocks == p.channels
        tiles = math.ceil(p.size0 / p.b0) * math.ceil(p.size1 / p.b1)
        assert (p.splits - 1) * p.per < tiles <= p.splits * p.per
    return p.size0 * (p.size1 if p.rows else p.size1 * p.channels)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_splits_cover_the_tensor_and_the_grid_fits(
    shape: tuple[int, int, int], itemsize: int, channels_last: bool
) -> None:
    for indexed in (False, True):
        p = streamed(*shape, channels_last, itemsize, indexed, False, 132)
        assert covered(p) == math.prod(shape)
        assert 0 < p.grid[0] < 2**31
        lane = math.ceil(p.per / p.b0) if p.rows else p.per
        assert lane <= SETTINGS.deepest
        assert p.size1 % p.vec == p.stride0 % p.vec == 0
        assert all(power_of_two(b) == b for b in (p.b0, p.b1, p.vec, p.warps))
    p = streamed(*shape, channels_last, itemsize, True, True, 132)
    assert p.splits == shape[0]
    once = at_once(*shape, channels_last, itemsize, 1, 132)
    if once is not None:
        assert covered(once) == math.prod(shape)
        assert once.b0 >= once.size0
        assert once.rows or once.b1 >= once.size1
        assert once.b0 * once.b1 <= SETTINGS.once


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("c", "s"), [(64, 3136), (512, 49), (1024, 1)])
def test_the_batch_size_does_not_choose_another_kernel(c: int, s: int, channels_last: bool) -> None:
    constants = {
        tuple(streamed(n, c, s, channels_last, 4, False, False, 132).constants.items()) for n in (1, 7, 32, 257)
    }
    assert len(constants) == 1


def test_what_fits_is_read_once_where_that_fills_the_device() -> None:
    assert at_once(32, 256, 196, False, 4, 1, 132) is not None
    assert at_once(32, 64, 3136, False, 4, 1, 132) is None  # 128 Ki values with padding
    assert at_once(32, 16, 784, False, 4, 1, 132) is None  # 16 programs for 132 multiprocessors
    assert at_once(8, 16, 196, False, 4, 1, 132) is not None  # nor does it matter there
