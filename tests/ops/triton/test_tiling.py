"""The division of tensors into programs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from batchnorm.ops.triton import tiling
from batchnorm.ops.triton.settings import CANDIDATES, Settings
from batchnorm.ops.triton.tiling import TABLE, Tiling, at_once, power_of_two, settings_of, streamed
from tests.cases import CASES, Case, ids
from tests.ops.implementations import SMALL_TILES, SMALLER

SETTINGS = Settings()
SHAPES = [
    (32, 64, 12544), (32, 256, 3136), (256, 512, 49), (32, 2048, 49), (4096, 1024, 1), (1, 1, 1), (2, 1, 40_000),
    (70_000, 3, 1), (1, 4096, 7), (3, 1, 2**30), (2**31 + 1, 1, 1), (100_000, 3, 50), (1, 1, 2**32), (2**20, 3, 2**10),
]  # fmt: skip


def covered(p: Tiling) -> int:
    """Return the number of values that the splits cover, without padding."""
    assert (p.splits - 1) * p.per < p.lines <= p.splits * p.per
    if p.group:
        assert p.blocks * p.group == p.channels
        assert p.b1 == p.group * power_of_two(p.positions)
        return p.lines * p.positions * p.channels
    if p.rows:
        assert p.blocks * p.b1 >= p.channels
        return p.lines * p.channels
    assert p.blocks == p.channels
    return p.lines * p.channels * (p.vec if p.ahead else p.positions)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_splits_cover_the_tensor_and_the_grid_fits(
    shape: tuple[int, int, int], itemsize: int, channels_last: bool
) -> None:
    for indexed in (False, True):
        p = streamed(*shape, channels_last, itemsize, indexed, False, 132, SETTINGS)
        assert covered(p) == math.prod(shape)
        assert 0 < p.grid[0] < 2**31
        assert math.ceil(p.per / p.b0) <= SETTINGS.deepest
        assert p.constants["WIDE"] == (math.prod(shape) >= 2**30)
        strides = (shape[1],) if p.rows and not p.group else (shape[2], math.prod(shape[1:]))
        assert all(s % p.vec == 0 for s in strides) or (p.group and p.group * shape[2] % p.vec == 0)
        assert p.vec * itemsize <= 16
        assert all(power_of_two(b) == b for b in (p.b0, p.b1, p.vec, p.warps))
    p = streamed(*shape, channels_last, itemsize, True, True, 132, SETTINGS)
    assert p.splits == shape[0]
    once = at_once(*shape, channels_last, itemsize, 1, 132, SETTINGS)
    if once is not None:
        assert covered(once) == math.prod(shape)
        assert once.b0 >= once.lines
        assert once.rows or once.b1 >= once.positions
        assert once.b0 * once.b1 <= SETTINGS.once
        assert once.warps <= 16  # 1,024 threads where a warp has 64 lanes


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("c", "s"), [(64, 3136), (512, 49), (1024, 1)])
def test_the_batch_size_does_not_choose_another_kernel(c: int, s: int, channels_last: bool) -> None:
    constants = {
        tuple(streamed(n, c, s, channels_last, 4, False, False, 132, SETTINGS).constants.items())
        for n in (1, 7, 32, 257)
    }
    assert len(constants) == 1


def test_three_programs_with_vectors_of_coefficients_fit_a_multiprocessor() -> None:
    for shape, channels_last in (((32, 64, 3136), True), ((256, 2048, 49), False)):
        p = streamed(*shape, channels_last, 2, False, False, 132, SETTINGS)
        assert p.rows
        assert p.registers is not None
        assert 3 * 32 * p.warps * p.registers <= 1 << 16
    assert streamed(32, 64, 3136, True, 2, True, False, 132, SETTINGS).registers is None  # would spill vectors of rows


def test_channels_that_share_a_line_are_read_once_if_they_fit() -> None:
    small = at_once(32, 2048, 49, False, 2, 1, 132, SETTINGS)
    assert small is not None
    assert (small.group, small.b0, small.b1, small.blocks) == (8, 32, 512, 256)
    assert at_once(256, 2048, 49, False, 2, 1, 132, SETTINGS) is None
    few = at_once(64, 16, 49, False, 2, 1, 132, SETTINGS)  # two launches would take longer than narrow accesses
    assert few is not None
    assert few.group == 0


def test_tensors_that_fit_are_read_once_if_that_fills_the_device() -> None:
    assert at_once(32, 256, 196, False, 4, 1, 132, SETTINGS) is not None
    assert at_once(32, 64, 3136, False, 4, 1, 132, SETTINGS) is None  # 128 Ki values with padding
    assert at_once(32, 16, 784, False, 4, 1, 132, SETTINGS) is None  # 16 programs for 132 multiprocessors
    assert at_once(8, 16, 196, False, 4, 1, 132, SETTINGS) is not None  # nor does it matter there


def test_more_programs_than_a_grid_allows_raise_an_error() -> None:
    p = streamed(2**18, 2**13, 2, False, 2, True, True, 132, SETTINGS)
    with pytest.raises(ValueError, match=r"expect fewer than 2\*\*31 pairs .* got 2147483648. Split the batch"):
        _ = p.grid


@pytest.mark.parametrize("rows", [False, True])
def test_all_tunable_settings_fit_the_registers(rows: bool) -> None:
    for values in itertools.product(*CANDIDATES.values()):
        settings = Settings(*values)
        for itemsize in (2, 4):
            p = streamed(32, 64, 3136, rows, itemsize, False, False, 132, settings)
            assert p.ahead == settings.ahead
            assert p.per % (p.b0 * p.ahead) == 0  # only the last split has tiles with a mask
            assert 4 * p.b0 * p.b1 <= 128 * 32 * p.warps  # the values that a lane of moments sums


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 49, 392, 1000, 4097, 2**20 - 1, 2**29 + 1])
def test_a_line_is_divided_by_the_lines_of_a_sample_exactly(
    monkeypatch: pytest.MonkeyPatch, width: int, wide: bool
) -> None:
    monkeypatch.setattr(tiling, "_WIDE", 0 if wide else 2**63)
    p = dataclasses.replace(streamed(4, 8, 64, False, 4, True, False, 132, SETTINGS), width=width)
    _, _, _, magic, bits = p.shape
    word, last = (64, 2**62) if wide else (32, 2**30)
    assert magic < 2 ** (word - 1)
    for k in {0, 1, width - 1, width, 12345 * width - 1, 12345 * width, last - last % width - 1, last - 1}:
        if k < last:
            assert (4 * k * magic >> word) >> bits == k // width


@pytest.mark.parametrize(
    ("shape", "itemsize", "group"),
    [((256, 2048, 49), 2, 8), ((256, 2048, 49), 4, 4), ((2, 20, 49), 2, 4), ((256, 512, 196), 2, 0),
     ((64, 512, 9), 2, 16), ((64, 21, 49), 2, 0),
     ((32, 64, 3136), 2, 0), ((32, 64, 1225), 2, 0)],
)  # fmt: skip
def test_channels_of_a_size_that_wide_accesses_do_not_divide_share_a_line(
    shape: tuple[int, int, int], itemsize: int, group: int
) -> None:
    p = streamed(*shape, False, itemsize, False, False, 132, SETTINGS)
    assert p.group == group
    assert p.vec * itemsize == 16 or not group or shape == (2, 20, 49)
    assert streamed(*shape, False, itemsize, True, False, 132, SETTINGS).group == 0  # samples differ in their rows


def test_every_class_of_tensors_has_settings_that_tuning_can_reach() -> None:
    assert set(TABLE) == {(rows, itemsize) for rows in (False, True) for itemsize in (2, 4)}
    for settings in TABLE.values():
        assert all(getattr(settings, field) in candidates for field, candidates in CANDIDATES.items())
    assert settings_of(1, False, 4) is TABLE[True, 4]  # [N, C]
    assert settings_of(49, False, 2) is TABLE[False, 2]


@pytest.mark.parametrize("case", [case for case in CASES if case.shape in SMALLER], ids=ids)
def test_the_emulator_runs_the_variants_of_large_tensors_on_small_ones(case: Case) -> None:
    tilings = []
    for n, c, *positions in (case.shape, SMALLER[case.shape]):
        sizes = (n, c, math.prod(positions), case.layout == "channels_last", case.dtype.itemsize)
        p = streamed(*sizes, False, False, 2, SMALL_TILES)
        assert at_once(*sizes, 1, 2, SMALL_TILES) is None
        assert p.splits > 1
        assert p.ahead is not None
        assert p.per >= 2 * p.b0 * p.ahead
        assert p.lines % (p.b0 * p.ahead) != 0
        tilings.append(p)
    large, small = tilings
    assert small.constants == large.constants
