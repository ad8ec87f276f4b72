"""The limits of the machine: streams move what they should, steps are judged by the floor, and cache sizes are kept."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.measuring.options import Options
from benchmarks.measuring.timing import passes_in_turns
from benchmarks.reports import limits_report, targets
from benchmarks.sections import layers, limits
from benchmarks.subjects import cases, in_cache, streams
from benchmarks.subjects.peers import OURS, TORCH, TORCH_INPLACE


@pytest.fixture
def compiled_streams():
    if streams.library() is None:
        pytest.skip("needs a C++ compiler")


def exclusive_or(*tensors):
    words = [t.flatten().view(torch.int64).numpy() for t in tensors]
    return int(np.bitwise_xor.reduce(np.concatenate(words)))


@pytest.mark.usefixtures("compiled_streams")
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("non_temporal", [False, True])
@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (3, 32, 7, 7), (2, 5, 4, 16)], ids=cases.shape_text)
def test_streams_read_and_write_every_value(shape, inputs, non_temporal):
    tensors = [torch.randn(shape) for _ in range(inputs)]
    wanted = tensors[0].view(torch.int32)
    if inputs == 2:
        wanted = wanted ^ tensors[1].view(torch.int32)
    whole, by_channel = torch.zeros(shape), torch.zeros(shape)
    assert streams.read(*tensors) == exclusive_or(*tensors)
    streams.map_to(whole, *tensors, non_temporal=non_temporal)
    assert streams.channels_to(by_channel, *tensors, non_temporal=non_temporal) == exclusive_or(*tensors)
    for out in (whole, by_channel):
        assert torch.equal(out.view(torch.int32), wanted)


def test_passes_take_turns_and_the_second_gets_the_result_of_the_first():
    calls = []
    contenders = {name: (partial(lambda n: n, name), calls.append) for name in "ab"}
    times = passes_in_turns(contenders, 0.0, least=2)
    assert calls[4:] == ["a", "a", "b", "b", "b", "b", "a", "a"]  # each timed step follows an untimed one
    assert all(len(own.seconds) == 2 for both in times.values() for own in both)


def limit_rows(ours, torchs, floor, by_channel=None, cached=0.1, threads=1):
    """Return rows of a case of 1000 bytes for each thread. In the cache, 100 take 0.1 ms, and 900 more `cached` ms."""
    contenders = {OURS: ours, TORCH: torchs, TORCH_INPLACE: 2 * torchs}
    contenders |= {limits.FLOOR + ending: floor * (1 + slow) for slow, ending in enumerate(limits.NON_TEMPORAL)}
    if by_channel is not None:
        contenders |= {limits.BY_CHANNEL + ending: by_channel for ending in limits.NON_TEMPORAL}
    contenders |= {in_cache.QUARTER: 0.1, in_cache.WHOLE: 0.1 + cached / 9}
    size = {in_cache.QUARTER: 100, in_cache.WHOLE: 200}
    where = {"shape": "2×3×4×4", "layout": "contiguous", "dtype": "float32", "threads": str(threads)}
    return [
        where | {"contender": name, "bytes": str(size.get(name, 1000 * threads)), "pass": pass_, "p50_ms": str(ms)}
        for name, ms in contenders.items()
        for pass_ in limits.PASSES
    ]


def test_limits_table_shows_the_speedup_at_the_floor():
    *_, row = limits_report.limits_markdown(limit_rows(2.0, 6.0, 1.0, 1.5)).splitlines()
    assert row == ("| 2×3×4×4 | contiguous | float32 | 12 | 4 | 3.00× | 2 | 6.00× | 50% | 3 | 0.4 | 75% | 75% | 75% |")
    *_, row = limits_report.limits_markdown(limit_rows(2.0, 6.0, 1.0)).splitlines()
    assert row == ("| 2×3×4×4 | contiguous | float32 | 12 | 4 | 3.00× | 2 | 6.00× | 50% |  | 0.4 | 50% | 50% | 50% |")


@pytest.mark.parametrize("threads", [1, 3])
def test_bound_is_the_slower_of_memory_and_of_instructions(threads):
    (limit,) = limits_report.limits(limit_rows(2.0, 6.0, 1.0, 1.5, cached=1.7, threads=threads))
    assert limit.in_cache == pytest.approx(dict.fromkeys(limits.PASSES, 1.8))  # 0.1 ms, and 1.7 ms for 900 bytes more
    assert limit.bound == limit.in_cache
    (limit,) = limits_report.limits(limit_rows(2.0, 6.0, 1.0, 1.5, cached=1.2))
    assert limit.bound == limit.by_channel


@pytest.mark.parametrize("shape", cases.LARGE, ids=cases.shape_text)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_data_in_the_cache_are_of_the_same_kind_and_fit(shape, dtype):
    for layout in cases.layouts_of(shape):
        case = cases.Case(shape, layout, dtype, cases.STEP)
        quarter, whole = in_cache.in_cache(case).values()
        assert whole.nbytes == 4 * quarter.nbytes
        assert whole.nbytes > 80 << 10 and 3 * whole.nbytes <= 1 << 19  # x, dy and dx in half a megabyte
        assert len(whole.shape) == len(shape)
        for own in (quarter, whole):
            assert (own.layout, own.dtype) == (layout, dtype)
            assert cases.make_data(own).x.is_contiguous() is (layout == "contiguous")
            if case.spreads:
                assert own.shape[1] == min(shape[1], 512)
            else:  # rows of the same length, and short ones in whole cache lines
                row = own.shape[2]
                assert row == math.prod(shape[2:]) or row >= 4096
                assert row >= 128 or own.shape[1] * row * cases.DTYPES[dtype].itemsize % 64 == 0


def test_passes_in_the_cache_compute_a_step():
    case = cases.Case((2, 4, 7, 1), "contiguous", "float32", cases.STEP)
    passes = in_cache.repeated_passes(case)
    mean, _, var = passes.forward()
    passes.backward((mean, _, var))
    x = cases.make_data(case).x
    torch.testing.assert_close(mean, x.mean([0, 2, 3]))
    torch.testing.assert_close(var, x.var([0, 2, 3], correction=0))


@pytest.mark.parametrize(
    ("ours", "torchs", "floor", "met"),
    [
        (2.0, 10.0, 1.9, True),  # fast enough
        (2.0, 8.0, 1.0, False),  # the floor allows 4.5×
        (2.0, 8.0, 1.9, True),  # the floor does not, and the step is at 95 % of it
        (2.0, 4.0, 1.0, False),  # the floor does not, and the step is at 50 % of it
    ],
)
def test_step_is_judged_by_what_the_floor_allows(ours, torchs, floor, met):
    (verdict,) = targets.limit_verdicts(limit_rows(ours, torchs, floor))
    assert verdict.met is met
    assert ("missed by 2×3×4×4" in verdict.measured) is not met


def test_large_tensors_have_fewer_tasks_with_the_default_allocator(tmp_path):
    def tasks(allocator, shapes):
        options = Options(tmp_path, quick=False, seconds=1.0, threads=1, only="", allocator=allocator)
        return {c.task_name for c in layers.cases(options) if c.shape in shapes}

    assert tasks("kept", cases.LARGE) == tasks("default", cases.SMALL) == set(cases.TASKS)
    assert tasks("default", cases.LARGE) == set(cases.JUDGED_BY_DEFAULT)
