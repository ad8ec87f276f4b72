"""Tests that need a GPU. The tests of the contract also run there, with the implementation "cuda"."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import batchnorm
from batchnorm.ops import eager
from tests.ops.triton import nccl_worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

ATTRIBUTES = (1e-5, "relu", 0.0)


@pytest.fixture(autouse=True)
def _convolutions_in_float32() -> Iterator[None]:
    """cuDNN's round to TF32, which is coarser than what is tested here."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), batchnorm.BatchNormAct2d(16, activation="relu"),
        nn.Conv2d(16, 8, 3), batchnorm.BatchNorm2d(8), nn.Flatten(), nn.Linear(800, 4),
    ).cuda()  # fmt: skip


def images() -> Tensor:
    return torch.randn(8, 3, 12, 12, device="cuda")


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_kernels_are_used_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchnorm.BatchNorm2d(3).cuda()(torch.randn(2, 3, 4, 4, device="cuda"))
    assert batchnorm.backends()["cuda"].startswith("triton")


def test_the_network_trains_as_on_the_cpu() -> None:
    model, x = network().double(), images().double()  # float64: eager on both sides
    expected = gradients(copy.deepcopy(model).cpu(), x.cpu())
    model = model.float()
    for ours, reference in zip(gradients(model, x.float()), expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")  # torch's own
@pytest.mark.usefixtures("nothing_compiled_before")
def test_it_compiles_into_one_graph() -> None:
    model, x = network(), images()
    model(x)
    expected = gradients(copy.deepcopy(model), x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x), expected, rtol=1e-3, atol=1e-5)


def test_a_step_is_captured_and_replayed() -> None:
    layer, x = batchnorm.BatchNormAct2d(64, activation="relu").cuda(), torch.randn(32, 64, 56, 56, device="cuda")
    dy = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        inputs = x.detach().requires_grad_()
        y = layer(inputs)
        return (y.detach(), *torch.autograd.grad(y, [inputs, *layer.parameters()], dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tracked = int(layer.num_batches_tracked)
    graph.replay()
    assert int(layer.num_batches_tracked) == tracked + 1
    for again, first in zip(captured, expected, strict=True):
        assert torch.equal(again, first)


def test_work_on_another_stream_waits_only_for_that_stream() -> None:
    layer, x = batchnorm.BatchNorm2d(64).cuda(), torch.randn(64, 64, 56, 56, device="cuda")
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # kernels on another stream would read memory that is not written yet
        late = torch.empty_like(x).copy_(x)
        y = layer(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


def test_launches_of_two_streams_that_overlap_give_the_same_bits() -> None:
    x = torch.randn(64, 64, 56, 56, device="cuda")
    expected = torch.ops.batchnorm.moments(x, None, None, 1)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(torch.ops.batchnorm.moments(x, None, None, 1))
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current_computes_its_own_tensors() -> None:
    layer, x = batchnorm.BatchNormAct2d(8, activation="relu"), torch.randn(4, 8, 6, 6)
    results = []
    for device in ("cuda:0", "cuda:1"):
        inputs = x.to(device).requires_grad_()
        y = copy.deepcopy(layer).to(device)(inputs)
        y.square().sum().backward()
        assert inputs.grad is not None
        assert y.device == inputs.grad.device == torch.device(device)
        results.append((y.detach().cpu(), inputs.grad.cpu()))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_the_same_every_run(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(32, 64, 57, 55, device="cuda").to(dtype).to(memory_format=layout)
    op = torch.ops.batchnorm

    def everything() -> list[Tensor]:
        y, *statistics = op.train_forward(x, None, None, None, *ATTRIBUTES)
        kept = (x, x, None, None, *statistics, None, None)
        index = torch.arange(32, device="cuda") % 3
        return [y, *statistics, *op.train_backward(*kept, *ATTRIBUTES, True), *op.moments(x, index, None, 3)]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_values_than_32_bits_count(layout: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of the device's memory")
    shape = (70_001, 8, 64, 61)  # more samples than an axis of a grid allows, and 2.2e9 values
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    if layout == "channels_last":
        x = torch.zeros(70_001, 64, 61, 8, dtype=torch.bfloat16, device="cuda").movedim(-1, 1)
    x[-1] = 1.0
    m = shape[0] * shape[2] * shape[3]
    y, mean, mean_low, var = torch.ops.batchnorm.train_forward(x, None, None, None, 1e-5, "none", 0.0)
    share = 1 / shape[0]
    torch.testing.assert_close((mean + mean_low).cpu(), torch.full((8,), share), rtol=1e-5, atol=0)
    torch.testing.assert_close(var.cpu(), torch.full((8,), share * (1 - share)), rtol=1e-5, atol=0)
    expected = (1 - share) / (share * (1 - share) + 1e-5) ** 0.5
    assert (y[-1].float() - expected).abs().max() < 0.01 * expected
    assert y[0].float().abs().max() < 0.01
    _, _, dbias, _ = torch.ops.batchnorm.train_backward(
        x, x, None, None, mean, mean_low, var, None, None, 1e-5, "none", 0.0, False
    )
    torch.testing.assert_close(dbias.cpu(), torch.full((8,), m * share), rtol=1e-5, atol=0)


def test_autocast_and_peak_memory() -> None:
    x = torch.randn(64, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    peaks = []
    for norm in (batchnorm.BatchNormAct2d(64, activation="relu"), nn.Sequential(nn.BatchNorm2d(64), nn.ReLU())):
        model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), norm).cuda().to(memory_format=torch.channels_last)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            y.float().sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            assert y.dtype == torch.bfloat16
            del y
    assert peaks[1] < peaks[3]


def test_eager_agrees_with_the_kernels_on_the_device() -> None:
    x = torch.randn(16, 32, 40, 40, device="cuda")
    ours = torch.ops.batchnorm.train_forward(x, None, None, None, *ATTRIBUTES)
    torch.testing.assert_close(ours, eager.train_forward(x, None, None, None, *ATTRIBUTES), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < nccl_worker.PROCESSES, reason="needs two GPUs")
def test_two_devices_normalize_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(nccl_worker.run, (f"file://{tmp_path}/store",), nccl_worker.PROCESSES)
