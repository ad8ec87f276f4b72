"""The expected time on a GPU: what it counts, and what must hold for any device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.layers import Case
from benchmarks.gpu.model import page
from benchmarks.gpu.model.devices import DEVICES
from benchmarks.gpu.model.expected import Cache, Expected, Work, expected, limits_of, merged, together
from benchmarks.gpu.static.compiling import Launch, launches, training_step

H200 = DEVICES[0]
LARGE = Case((256, 64, 56, 56), "contiguous", "bfloat16", False)
HELD = Case((32, 1024, 14, 14), "contiguous", "float32", True)


@pytest.fixture(scope="module")
def step() -> list[Launch]:
    with launches(H200.architecture, H200.processors) as found:
        training_step(LARGE)
    return found


@pytest.mark.parametrize("case", [LARGE, HELD], ids=["streamed", "held"])
def test_bytes_are_those_of_the_launches_arguments(case: Case) -> None:
    with launches(H200.architecture, H200.processors) as found:
        training_step(case)
    moved = sum(t.nbytes for launch in found for tensors in launch.tensors() for t in tensors)
    passes = case.traffic(4 * H200.registers, 0) if case is LARGE else case.least_traffic
    assert moved == passes * case.nbytes
    no_cache = dataclasses.replace(H200, cache=0)
    partial = sum(t.nbytes for launch in found for t in merged(launch))
    assert expected(case, no_cache).bytes == moved + partial
    assert expected(case, no_cache).launches == len(found)


def test_a_warp_executes_its_loop_once_for_each_of_its_values(step: list[Launch]) -> None:
    by_name = {launch.name: launch for launch in step}
    work = Work.of(by_name["normalize"])
    threads = 32 * work.launch.warps * work.launch.programs
    each = work.instructions * threads / (LARGE.nbytes / 2)
    assert 1 < each < 40  # instructions a value
    assert work.waits > 1


def test_no_time_is_below_the_floor_and_a_better_device_is_never_slower() -> None:
    for case in (LARGE, HELD):
        found = expected(case, H200)
        assert found.floor < found.seconds
        assert found.floor < found.torch
        for change in ({"bandwidth": 2 * H200.bandwidth}, {"clock": 2 * H200.clock}, {"cache": 8 * H200.cache}):
            assert expected(case, dataclasses.replace(H200, **change)).seconds <= found.seconds
        slower = expected(case, dataclasses.replace(H200, bandwidth=H200.bandwidth / 16))
        assert slower.limit == "memory"
        assert slower.seconds < 16 * found.seconds


def test_the_largest_limit_decides_and_close_ones_add_up() -> None:
    assert together({"a": 1.0, "b": 0.0}) == 1.0
    assert 1.0 < together({"a": 1.0, "b": 0.5}) < 1.05
    assert together({"a": 2.0, "b": 2.0}) == pytest.approx(2 * 2**0.25)


def test_a_multiprocessor_holds_as_many_programs_as_its_smallest_resource() -> None:
    assert H200.resident(8, 32, 0) == 8  # warps
    assert H200.resident(8, 95, 0) == 2  # registers: 96 of each thread
    assert H200.resident(1, 16, 0) == 32  # programs
    assert H200.resident(1, 16, 100 << 10) == 2  # shared memory
    assert H200.resident(32, 255, 0) == 1


def test_programs_that_wait_one_after_another_take_as_many_waves(step: list[Launch]) -> None:
    work = Work.of(step[0])
    more = dataclasses.replace(work, launch=dataclasses.replace(work.launch, programs=10 * work.launch.programs))
    assert limits_of(more, H200, 0)["latency"] > 5 * limits_of(work, H200, 0)["latency"]
    assert limits_of(more, H200, 0)["instructions"] == pytest.approx(10 * limits_of(work, H200, 0)["instructions"], 0.2)


def _simulated_misses(tiles: int, capacity: int, written: bool) -> int:
    """Tiles that the second of two kernels misses, in a cache that drops what was used longest ago."""
    cache: OrderedDict[tuple[str, int], None] = OrderedDict()

    def use(key: tuple[str, int]) -> bool:
        hit = cache.pop(key, 0) is None
        cache[key] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
        return hit

    for i in range(tiles):
        use(("x", i))
    missed = 0
    for i in reversed(range(tiles)):
        missed += not use(("x", i))
        del cache["x", i]  # evicted first
        if written:
            use(("y", i))
    return missed


@pytest.mark.parametrize("tiles", [50, 100, 400])
@pytest.mark.parametrize("written", [False, True])
def test_the_cache_holds_what_a_simulated_one_does(tiles: int, written: bool) -> None:
    x = torch.empty(tiles, dtype=torch.uint8, device="meta")
    cache = Cache(100)
    assert cache.missed([x]) == tiles
    assert cache.missed([x]) == _simulated_misses(tiles, 100, written)
    assert cache.missed([torch.empty(7, dtype=torch.uint8, device="meta")]) == 7


def test_the_page_has_a_row_for_each_case_and_a_column_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BATCHES", (32,))
    monkeypatch.setattr(page, "LAYERS", ((64, 56),))
    monkeypatch.setattr(page, "expected", lambda case, device: Expected(3e-6, 1e-6, 5e-6, 4, 1.0, 1.0, "memory"))
    rows = page.expected_rows()
    assert len(rows) == 4 * len(DEVICES)
    lines = page.expected_markdown(rows).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].count("1 / 3 / 5") == len(DEVICES)
    static = [{"shape": "1", "kernel": "moments", "layout": "contiguous", "dtype": "float32", "instructions_a_value": 6.0, "registers": 40}]  # fmt: skip  # noqa: E501
    assert "| 6.0 (40) |" in page.static_markdown(static)
