"""Compile the kernels for devices that need not exist here, because a compiler accepts less than the interpreter."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from batchnorm.ops.triton import launch, tiling

ATTRIBUTES = (1e-5, "relu", 0.0)
Compiled = list[tuple[str, Any]]


class _Device:
    """The part of a driver that the compiler uses."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90])
def architecture(request: pytest.FixtureRequest) -> int:
    """Of A100, of H100 and H200."""
    return int(request.param)


@pytest.fixture
def compiled(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    """Kernels that launches compile but do not start, for tensors that are not on a GPU."""
    found: Compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert 0 < grid[0] < 2**31
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not known for _, known in found):
            found.append((self.fn.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(tiling, "multiprocessors", lambda device: 132)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Device(architecture))
    return found


def _names(compiled: Compiled) -> list[str]:
    return sorted(name for name, _ in compiled)


def _accesses_16_bytes(kernel: Any) -> bool:
    ptx = kernel.asm["ptx"]
    return "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx


def _spilled_bytes(kernel: Any, directory: Path) -> int:
    """Of a thread's registers, in memory."""
    path = directory / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None
    return int(found[1]) + int(found[2])


def _train(
    shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu"
) -> None:
    x = layout(torch.empty(shape, dtype=dtype, device=device))
    weight = torch.empty(shape[1], device=device)
    y, *statistics = launch.train_forward(x, weight, weight, x, *ATTRIBUTES)
    launch.train_backward(x, x, None, y, *statistics, weight, weight, *ATTRIBUTES, True)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.to(memory_format=torch.channels_last)


def test_one_set_of_kernels_reads_large_tensors_in_wide_accesses(compiled: Compiled, tmp_path: Path) -> None:
    _train((32, 64, 32, 32), torch.bfloat16, _channels_last)
    assert _names(compiled) == [
        "backward_apply_kernel",
        "backward_reduce_kernel",
        "merge_moments_kernel",
        "merge_sums_kernel",
        "moments_kernel",
        "normalize_kernel",
    ]
    for name, kernel in compiled:
        if not name.startswith("merge"):
            assert _accesses_16_bytes(kernel), name
        assert kernel.metadata.shared <= 48 << 10, name  # half of the smallest shared memory since Ampere
        assert _spilled_bytes(kernel, tmp_path) == 0, name
    for batch in (33, 7, 48):
        _train((batch, 64, 32, 32), torch.bfloat16, _channels_last)
    assert len(compiled) == 6


@pytest.mark.parametrize("architecture", [90], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_have_64_bits_for_tensors_beyond_32_bits(compiled: Compiled, layout: str) -> None:
    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x if layout == "contiguous" else x.new_empty(2, 2**30, 3).movedim(-1, 1)

    _train((2, 3, 2**30), torch.float16, laid_out, "meta")
    for name, kernel in compiled:
        if not name.startswith("merge"):
            assert kernel.src.constants[(kernel.src.fn.arg_names.index("WIDE"),)] is True, name


@pytest.mark.parametrize("architecture", [70], indirect=True)
def test_bfloat16_compiles_for_the_oldest_supported_devices(compiled: Compiled) -> None:
    _train((8, 16, 14, 14), torch.bfloat16, torch.Tensor.contiguous)
    assert len(compiled) == 2


@pytest.mark.parametrize("architecture", [90], indirect=True)
def test_kernels_spill_few_registers(compiled: Compiled, tmp_path: Path) -> None:
    _train((256, 2048, 7, 7), torch.float32, torch.Tensor.contiguous, "meta")  # rows too odd for wide accesses
    assert _names(compiled) == ["backward_once_kernel", "forward_once_kernel"]
    for name, kernel in compiled:
        assert _spilled_bytes(kernel, tmp_path) <= 256, name


def test_every_launch_is_made_while_the_tensors_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.Tensor] = []

    @contextlib.contextmanager
    def on_device(t: torch.Tensor) -> Iterator[None]:
        inside.append(t)
        yield
        inside.pop()

    launched: list[int] = []
    monkeypatch.setattr(tiling, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "on_device", on_device)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: launched.append(len(inside)))
    _train((8, 16, 14, 14), torch.float32, torch.Tensor.contiguous)
    _train((64, 64, 32, 32), torch.float32, torch.Tensor.contiguous, "meta")
    _halves(torch.empty(6, 8, 5, 5, device="meta"))  # has no values, so that nothing can wait for one
    launch.start_one_kernel(torch.device("cpu"))
    assert len(launched) == 2 + 6 + 7 + 1
    assert set(launched) == {1}


def test_tensors_that_fit_on_the_chip_take_one_kernel_in_each_direction(compiled: Compiled) -> None:
    _train((8, 16, 14, 14), torch.float32, torch.Tensor.contiguous)
    assert _names(compiled) == ["backward_once_kernel", "forward_once_kernel"]
    assert all(_accesses_16_bytes(kernel) for _, kernel in compiled)


def _halves(x: torch.Tensor) -> None:
    vectors, index = x.new_empty(3, 8, dtype=torch.float32), x.new_zeros(6, dtype=torch.int64)
    weights, attributes = x.new_empty(6, 5, 5), (1e-5, "gelu", 0.0)
    launch.moments(x, index, weights, 3)
    launch.normalize(x, vectors, vectors, vectors, vectors, vectors, None, index, *attributes)
    kept = (x, x, None, None, vectors, vectors, vectors, vectors, vectors)
    launch.normalize_backward(*kept, index, 3, *attributes, True)
    launch.backward_apply(*kept, vectors, vectors, index, weights, *attributes, True)
    tracked = x.new_zeros((), dtype=torch.int64)
    launch.update_running_(*vectors[:2], tracked, *vectors, 12, None, None, True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_halves_compile_with_an_index_and_weights(compiled: Compiled, layout: torch.memory_format) -> None:
    _halves(torch.empty(6, 8, 5, 5, dtype=torch.float16).to(memory_format=layout))
    assert _names(compiled) == [
        "backward_apply_kernel",
        "backward_reduce_kernel",
        "merge_moments_kernel",
        "merge_sums_kernel",
        "moments_kernel",
        "normalize_kernel",
        "update_running_kernel",
    ]


@pytest.mark.parametrize("architecture", [90], indirect=True)
def test_absent_vectors_compile(compiled: Compiled) -> None:
    x = torch.empty(6, 8, 5, 5)
    mean, var = x.new_empty(2, 8).unbind()
    launch.train_forward(x, None, None, None, *ATTRIBUTES)
    launch.normalize(x, mean, None, var, None, None, None, None, *ATTRIBUTES)
    launch.normalize_backward(x, x, None, None, mean, None, var, None, None, None, 1, *ATTRIBUTES, True)
    assert _names(compiled) == ["backward_reduce_kernel", "forward_once_kernel", "normalize_kernel"]
