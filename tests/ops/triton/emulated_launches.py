"""Tests of the compiled kernels beyond the contract; test_emulated.py runs them in the emulator."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from batchnorm.ops import eager
from batchnorm.ops.triton import counters, frame, launch, tiling
from batchnorm.ops.triton.frame import Frame
from batchnorm.ops.triton.variants import Kernel
from tests.cases import Case
from tests.ops.triton.emulated import device, forward_and_update, operator
from tests.ops.triton.emulator.schedule import Schedule

ATTRIBUTES = (1e-5, "relu", 0.0)
SHAPES = {"one launch": (3, 5, 7, 7), "several": (4, 3, 16, 24)}
LAYOUTS = ["contiguous", "channels_last"]


@contextlib.contextmanager
def _compiled_anew(fused: bool) -> Iterator[None]:
    """Compile all kernels again, with or without the products that the compiler fuses by itself."""
    parse = CUDABackend.parse_options

    def parse_options(self: Any, given: dict[str, Any]) -> Any:
        return parse(self, given | {"enable_fp_fusion": fused})

    kernels = [value for value in vars(launch).values() if isinstance(value, Kernel)]
    assert kernels
    _forget(kernels)
    CUDABackend.parse_options = parse_options
    try:
        yield
    finally:
        CUDABackend.parse_options = parse
        _forget(kernels)


def _forget(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert isinstance(kernel.function, JITFunction)
        kernel.function.device_caches.clear()
    frame.forget()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_of_backward_is_that_of_forward_whatever_the_compiler_fuses(shape: str, layout: str) -> None:
    case = Case(SHAPES[shape], layout=layout)
    channels = case.shape[1]
    # Half of the values are normalized to nearly zero: x·scale and −bias round to the same number.
    signs = torch.arange(case.m * channels).reshape(case.shape) % 2 * 2 - 1
    x = case.place(signs / torch.full(case.shape, 3.0))
    weight = torch.linspace(0.3, 0.9, channels)
    mean, var = torch.zeros(channels), torch.linspace(0.7, 1.3, channels)
    scale = weight / (var + 1e-5).sqrt()
    bias = -(x.amax() * scale)
    vectors = (mean, None, var, weight, bias)

    def forward() -> Tensor:
        return operator("normalize")(x, *vectors, None, None, *ATTRIBUTES)

    def backward() -> Tensor:
        saved = (torch.ones_like(x), x, None, None, *vectors)
        return operator("normalize_backward")(*saved, None, 1, *ATTRIBUTES, True)[3]

    y, dz = forward(), backward()
    assert 0 < (y > 0).sum() < y.numel()
    with _compiled_anew(fused=False):
        assert torch.equal(forward() > 0, y > 0)
        assert torch.equal(backward() > 0, y > 0)
    assert torch.equal(dz > 0, y > 0)


def _passes(case: Case) -> list[Tensor]:
    x, dy, (weight, bias) = case.x(), case.random(1), case.parameters()
    y, *statistics = operator("train_forward")(x, weight, bias, None, *ATTRIBUTES)
    saved = (dy, x, None, None, *statistics, weight, bias)
    return [y, *statistics, *operator("train_backward")(*saved, *ATTRIBUTES, True)]


def _training(case: Case) -> list[Tensor]:
    x, results = case.x(), _passes(case)
    statistics = results[1:4]
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1]), torch.tensor(3)
    operator("update_running_")(*running, *statistics, case.m, None, 0.1, True)
    updated = torch.zeros(x.shape[1]), torch.ones(x.shape[1]), torch.tensor(3)
    forward_and_update()(x, *case.parameters(), None, *ATTRIBUTES, *updated, 0.1)
    for a, b in zip(updated, running, strict=True):
        assert torch.equal(a, b)
    return [*results, *running, *operator("moments")(x, None, None, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_programs_and_threads_does_not_change_a_bit(
    shape: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(SHAPES[shape], torch.bfloat16, layout=layout)
    expected = _training(case)
    for seed in range(3):
        monkeypatch.setattr(device(), "schedule", Schedule(seed))
        for a, b in zip(_training(case), expected, strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def _many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "multiprocessors", lambda device: 10)
    monkeypatch.setattr(counters, "_counters", {})


MERGED = [((24, 2, 16, 16), "contiguous"), ((12, 8, 8, 8), "channels_last"), ((96, 4, 3, 5), "contiguous")]


@pytest.mark.usefixtures("_many_splits")
@pytest.mark.parametrize(("shape", "layout"), MERGED, ids=["planes", "rows", "several channels"])
def test_the_last_programs_merge_in_any_order_and_leave_counters_of_0(
    shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, used, expected = Case(shape, torch.bfloat16, layout=layout), device(), []
    assert Frame.of(case.x()).streamed().splits > 4  # merges of two levels
    for seed in (None, 0):
        monkeypatch.setattr(used, "schedule", Schedule(seed))
        before = used.launches.total()
        results = _passes(case)
        assert used.launches.total() - before == 4
        assert len(counters._counters) == 1
        assert not any(t.any() for t in counters._counters.values())
        expected = expected or results
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)


def test_a_sigmoid_near_zero_is_rounded_nearly_correctly() -> None:
    case = Case(SHAPES["several"])
    x = case.place(torch.linspace(-0.5, 0.5, case.m * case.shape[1]).reshape(case.shape))
    mean, var = torch.zeros(case.shape[1]), torch.full((case.shape[1],), 1 - 1e-5)
    y = operator("normalize")(x, mean, None, var, None, None, None, None, 1e-5, "sigmoid", 0.0)
    # The emulated exponential and division err as much as those of a GPU may.
    error = (y - x.double().sigmoid()).abs().max().item() / torch.finfo(x.dtype).eps
    assert error < 0.6


@pytest.mark.usefixtures("_many_splits")
def test_a_launch_of_another_stream_does_not_disturb_one_that_has_not_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (shape, layout), *_ = MERGED
    x, used, launch_whole = Case(shape, layout=layout).x(), device(), device().launch
    others: list[Tensor] = []

    def launch_halves(loaded: Any, grid: int, arguments: Any) -> None:
        assert grid > 8
        for half in (range(grid // 2), range(grid // 2, grid)):
            with monkeypatch.context() as patched:
                patched.setattr(used, "programs", lambda name, grid, half=half: half)
                launch_whole(loaded, grid, arguments)
            if not others:
                with monkeypatch.context() as patched:
                    patched.setattr(used, "launch", launch_whole)
                    patched.setattr(counters, "_counters", {})  # of another stream
                    others.extend(launch.moments(x, None, None, 1))

    expected = launch.moments(x, None, None, 1)
    with monkeypatch.context() as patched:
        patched.setattr(used, "launch", launch_halves)
        found = launch.moments(x, None, None, 1)
    for a, b, c in zip(expected, found, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def _last_of_many(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of zeros with more than 2³¹ values, of which the last is 3, without touching its memory."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    x.view(-1)[-1:] = 3.0
    return x


@pytest.mark.parametrize("shape", [(1, 9, 2**28 + 8), (2**30 + 8, 2)], ids=["contiguous", "rows"])
def test_offsets_reach_the_last_of_more_than_32_bits_of_values(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other programs do not run, so that nothing is merged, and the counters of the merge do not return to 0.
    monkeypatch.setattr(device(), "programs", lambda name, grid: [0, grid - 1])
    monkeypatch.setattr(counters, "_counters", {})
    shallow = dataclasses.replace(tiling.TABLE[True, 2], deepest=2)
    monkeypatch.setattr(tiling, "TABLE", dict.fromkeys(tiling.TABLE, shallow))
    x, zeros, ones = _last_of_many(shape), torch.zeros(shape[1]), torch.ones(shape[1])
    vectors = (zeros, zeros, ones, ones, ones)
    y = launch.normalize(x, *vectors, None, None, 0.0, "relu", 0.0)
    assert y.view(-1)[-1] == 4.0
    saved = (x, x, None, None, *vectors)
    dx, dz = launch.backward_apply(*saved, ones, zeros, None, None, 0.0, "relu", 0.0, True)
    assert dx.view(-1)[-1] == 2.0
    assert dz.view(-1)[-1] == 3.0
    launch.moments(x, None, None, 1)
    launch.backward_reduce(*saved, None, 1, 0.0, "relu", 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("absent", [(), (1,), (3,), (4,), (1, 3, 4)], ids=str)
def test_absent_vectors_are_their_defaults(absent: tuple[int, ...], layout: str) -> None:
    case = Case((3, 8, 4, 4), torch.float16, layout=layout)
    mean, var = case.running()
    weight, bias = case.parameters()
    defaults = {1: torch.zeros(8), 3: torch.ones(8), 4: torch.zeros(8)}
    given: list[Tensor | None] = [mean, torch.zeros(8), var, weight, bias]
    explicit = [defaults[i] if i in absent else v for i, v in enumerate(given)]
    missing = [None if i in absent else v for i, v in enumerate(given)]

    def everything(vectors: list[Any]) -> list[Tensor]:
        y = operator("normalize")(case.x(), *vectors, None, None, *ATTRIBUTES)
        saved = (case.random(1), case.x(), None, y, *vectors)
        return [y, *operator("normalize_backward")(*saved, None, 1, *ATTRIBUTES, True)]

    for a, b in zip(everything(missing), everything(explicit), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_running_statistics_in_half_precision_are_rounded_as_in_eager(dtype: torch.dtype) -> None:
    case = Case((3, 8, 4, 4), dtype)
    x = case.x()

    def running() -> tuple[Tensor, Tensor, Tensor]:
        mean, var = case.running()
        return mean.to(dtype), var.to(dtype), torch.tensor(3)

    expected, separately, together = running(), running(), running()
    _, *statistics = operator("train_forward")(x, None, None, None, *ATTRIBUTES)
    eager.update_running_(*expected, *statistics, case.m, None, 0.1, False)
    operator("update_running_")(*separately, *statistics, case.m, None, 0.1, False)
    forward_and_update()(x, None, None, None, *ATTRIBUTES, *together, 0.1)
    for found in (separately, together):
        assert all(map(torch.equal, found, expected))
