"""Compile the kernels for devices that need not exist here, because a compiler accepts less than the interpreter."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from batchnorm.ops.triton import kernels, launch, tiling
from benchmarks.gpu.layers import Case
from benchmarks.gpu.static import space, table
from benchmarks.gpu.static.compiling import Launch, launches, training_step
from benchmarks.measuring import records
from tests.ops.triton.pairs import pairs_of

STREAMED, HELD = (32, 64, 32, 32), (8, 16, 14, 14)


@pytest.fixture(autouse=True)
def _nothing_from_earlier_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _passes(found: list[Launch]) -> list[Launch]:
    """The launches that read or write tensors of x's shape."""
    return [each for each in found if any(each.tensors())]


def _accesses_16_bytes(found: Launch) -> bool:
    ptx = found.kernel.asm["ptx"]
    return re.search(r"ld\.global\S*\.v4\.b32", ptx) is not None


def test_kernels_compile_with_every_pair_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as calls with every pair of values have them; `make gpu-static` combines three values."""
    compiled: set[Any] = set()
    with launches("sm_90", frontend=True) as found:
        compile_launch = JITFunction.run

        def compile_new(function: JITFunction, *args: Any, **options: Any) -> None:
            pairs = pairs_of(function, dict(zip(function.arg_names, args, strict=False)) | options)
            if not pairs <= compiled:
                compile_launch(function, *args, **options)
                compiled.update(pairs)

        with monkeypatch.context() as patched:
            patched.setattr(JITFunction, "run", compile_new)
            for operator in space.CALLED:
                for choice in space.covering(space.factors(operator), 2):
                    space.call(operator, choice)
    assert {each.name for each in found} >= {"moments", "normalize", "backward_reduce", "backward_apply"}


def test_the_kernels_of_a_training_step_stay_within_their_limits() -> None:
    """If a change costs more on purpose, `python -m benchmarks gpu-static --limits` renews them."""
    limits = records.read(table.RESULTS / table.LIMITS)
    measured = records.read(table.RESULTS / table.TABLE)[0]["triton"]
    if triton.__version__ != measured:
        pytest.skip(f"the limits hold for Triton {measured}")
    # Counting takes as long as compiling, and both dtypes have the same loops.
    found = [row for case in table.table_cases() for row in table.rows("sm_90", [case], count=case.dtype == "bfloat16")]
    assert table.exceeded(found, limits) == []
    assert {table.key_of(row) for row in found} == {table.key_of(row) for row in limits}


def test_functions_of_kernels_have_no_default_values() -> None:
    """Triton 3.6 does not make them compile-time constants."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    functions = {v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)}
    assert len(functions) > 30
    for function in functions:
        parameters = inspect.signature(function.fn).parameters.values()
        assert all(p.default is p.empty for p in parameters), function.fn.__name__


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_one_set_of_kernels_reads_large_tensors_in_wide_accesses(architecture: str) -> None:
    with launches(architecture) as found:
        training_step(Case(STREAMED, "channels-last", "bfloat16", False))
        kernels = {id(each.kernel) for each in found}
        for batch in (33, 7, 48):
            training_step(Case((batch, *STREAMED[1:]), "channels-last", "bfloat16", False))
    assert {id(each.kernel) for each in found} == kernels
    for each in _passes(found):
        assert _accesses_16_bytes(each), each.name
        second_pass = each.name in ("normalize", "backward_apply")
        assert ("evict_first" in each.kernel.asm["ptx"]) == second_pass, each.name  # x is not needed afterwards
    for each in found:
        assert each.kernel.metadata.shared <= 48 << 10, each.name  # half of the smallest shared memory since Ampere


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_offsets_have_64_bits_for_tensors_beyond_32_bits(layout: str) -> None:
    with launches("sm_90") as found:
        training_step(Case((2, 3, 2**15, 2**15), layout, "bfloat16", False))
    assert all(each.arguments["WIDE"] is True for each in _passes(found))


def test_bfloat16_compiles_for_the_oldest_supported_devices() -> None:
    with launches("sm_70") as found:
        training_step(Case(HELD, "contiguous", "bfloat16", False))
    assert [each.name for each in _passes(found)] == ["forward_once", "backward_once"]


def test_tensors_that_fit_on_the_chip_take_one_kernel_in_each_direction() -> None:
    with launches("sm_90") as found:
        training_step(Case(HELD, "contiguous", "float32", False))
    assert [each.name for each in _passes(found)] == ["forward_once", "backward_once"]
    assert all(map(_accesses_16_bytes, _passes(found)))


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
    for operator in space.CALLED:
        space.call(operator, {name: values[0] for name, values in space.factors(operator).items()})
    launch.start_smallest_kernel(torch.device("cpu"))
    assert len(launched) > len(space.CALLED)
    assert set(launched) == {1}
