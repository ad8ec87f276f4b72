"""The kernels are compiled for a device that need not be there: what an interpreter accepts a compiler may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from batchnorm.ops.triton import launch, plan

ATTRIBUTES = (1e-5, "relu", 0.0)
Compiled = list[tuple[str, Any]]


class _Device:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiled:
    """Kernels as they are compiled, and not started, by launches on CPU tensors."""
    found: Compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not known for _, known in found):
            found.append((self.fn.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(plan, "multiprocessors", lambda device: 132)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Device())
    return found


def _names(compiled: Compiled) -> list[str]:
    return sorted(name for name, _ in compiled)


def _accesses_16_bytes(kernel: Any) -> bool:
    ptx = kernel.asm["ptx"]
    return "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx


def _train(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = layout(torch.empty(shape, dtype=dtype))
    weight = torch.empty(shape[1])
    y, *statistics = launch.train_forward(x, weight, weight, x, *ATTRIBUTES)
    launch.train_backward(x, x, None, y, *statistics, weight, weight, *ATTRIBUTES, True)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.to(memory_format=torch.channels_last)


def test_large_tensors_are_streamed_in_wide_accesses_by_one_set_of_kernels(compiled: Compiled) -> None:
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
        assert kernel.metadata.shared <= 48 << 10, name  # half of the least that a device since Ampere has
    for batch in (33, 7, 48):
        _train((batch, 64, 32, 32), torch.bfloat16, _channels_last)
    assert len(compiled) == 6


def test_what_fits_on_the_chip_takes_one_kernel_each_way(compiled: Compiled) -> None:
    _train((8, 16, 14, 14), torch.float32, torch.Tensor.contiguous)
    assert _names(compiled) == ["backward_once_kernel", "forward_once_kernel"]
    assert all(_accesses_16_bytes(kernel) for _, kernel in compiled)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_halves_compile_with_an_index_and_weights(compiled: Compiled, layout: torch.memory_format) -> None:
    x = torch.empty(6, 8, 5, 5, dtype=torch.float16).to(memory_format=layout)
    vectors, index = torch.empty(3, 8), torch.zeros(6, dtype=torch.int64)
    weights, attributes = torch.empty(6, 5, 5), (1e-5, "gelu", 0.0)
    launch.moments(x, index, weights, 3)
    launch.normalize(x, vectors, vectors, vectors, vectors, vectors, None, index, *attributes)
    kept = (x, x, None, None, vectors, vectors, vectors, vectors, vectors)
    launch.normalize_backward(*kept, index, 3, *attributes, True)
    launch.backward_apply(*kept, vectors, vectors, index, weights, *attributes, True)
    assert len(compiled) == 6
    tracked = torch.zeros((), dtype=torch.int64)
    launch.update_running_(*torch.empty(2, 8), tracked, *torch.empty(3, 8), 12, None, None, True)
    assert _names(compiled)[-1] == "update_running_kernel"
