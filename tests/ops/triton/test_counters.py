"""The counters of launches: one set for each stream, and others in a captured graph."""

from __future__ import annotations

import pytest
import torch

from batchnorm.ops.triton import counters as module
from batchnorm.ops.triton.counters import counters

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


class _Streams:
    current, capturing = 0, False


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> type[_Streams]:
    """Let counters of a GPU be on the CPU, and choose the stream."""
    zeros = torch.zeros
    monkeypatch.setattr(module, "_counters", {})
    monkeypatch.setattr(module, "_allocated", lambda device, number: zeros(number, dtype=torch.int32))
    monkeypatch.setattr(torch, "zeros", lambda number, dtype, device: zeros(number, dtype=dtype))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: _Streams.current, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: _Streams.capturing)
    monkeypatch.setattr(_Streams, "current", 0)
    monkeypatch.setattr(_Streams, "capturing", False)
    return _Streams


def test_launches_of_a_stream_share_counters_and_streams_do_not(streams: type[_Streams]) -> None:
    first = counters(CUDA, 10)
    assert counters(CUDA, 20) is first
    streams.current = 7
    assert counters(CUDA, 10) is not first
    assert counters(torch.device("cuda:1"), 10) is not counters(CUDA, 10)
    streams.current = 0
    assert counters(CUDA, 10) is first


def test_more_counters_than_before_are_new_and_stay(streams: type[_Streams]) -> None:
    first = counters(CUDA, 10)
    second = counters(CUDA, first.numel() + 1)
    assert second.numel() > first.numel()
    assert counters(CUDA, 10) is second


@pytest.mark.parametrize("stream", [0, module._PER_THREAD])
def test_each_launch_of_a_captured_graph_or_of_threads_has_its_own(streams: type[_Streams], stream: int) -> None:
    streams.current, streams.capturing = stream, stream == 0
    first, second = counters(CUDA, 10), counters(CUDA, 10)
    assert first is not second
    assert not first.any()
    assert not module._counters


def test_memory_that_cannot_be_allocated_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_counters", {})

    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        counters(CPU, 3)
    assert not module._counters


def test_counters_are_zero_and_int32() -> None:
    found = counters(CPU, 3)
    assert found.dtype == torch.int32
    assert not found.any()
    assert found.numel() >= 3
