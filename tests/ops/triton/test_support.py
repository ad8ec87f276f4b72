"""The choice of the implementation for CUDA tensors, and the warnings if the kernels cannot be used."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm
from batchnorm.ops import eager, triton
from batchnorm.ops.triton import support

CUDA = torch.device("cuda:0")
ATTRIBUTES = (1e-5, "relu", 0.0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")


@pytest.fixture(autouse=True)
def _nothing_asked_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(support.KERNELS, raising=False)
    monkeypatch.setattr(support, "_known", {})
    support._warn_once.cache_clear()
    yield
    support._warn_once.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(support, "_import_problem", lambda: None)
    monkeypatch.setattr(support, "_launch_problem", lambda device: None)


def test_a_supported_device_uses_the_kernels_without_a_warning(gpu: None) -> None:
    assert support.problem(CUDA) is None


def test_eager_is_chosen_without_a_warning(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(support.KERNELS, "eager")
    assert support.problem(CUDA) == "BATCHNORM_GPU_KERNELS=eager"
    assert batchnorm.backends()["cuda"] == "eager: BATCHNORM_GPU_KERNELS=eager"


def test_an_unknown_choice_gives_a_warning(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(support.KERNELS, "cutlass")
    with pytest.warns(RuntimeWarning, match="BATCHNORM_GPU_KERNELS expects one of triton, eager, got 'cutlass'"):
        assert support.problem(CUDA) is None


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("get_device_capability", lambda device: (6, 1), "compute capability 6.1 is below 7.0"),
        ("hip", "7.0", "not been tested on AMD GPUs"),
        ("_import_problem", lambda: "Triton does not import (ModuleNotFoundError: ...)", "Triton does not import"),
        ("_launch_problem", lambda device: "a Triton kernel does not start (...)", "does not start"),
    ],
)
def test_one_warning_gives_the_reason_if_the_kernels_cannot_be_used(
    gpu: None, monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str
) -> None:
    owner = next(o for o in (torch.cuda, torch.version, support) if hasattr(o, name))
    monkeypatch.setattr(owner, name, value)
    with pytest.warns(
        RuntimeWarning,
        match=f"plain torch operations on CUDA devices, which are slower. Install what is missing.*{reason}",
    ):
        found = support.problem(CUDA)
    assert found is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert support.problem(CUDA) == found
        assert support.problem(torch.device("cuda:1")) == found
    assert batchnorm.backends()["cuda"] == f"eager: {found}"


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in [m for m in sys.modules if m.startswith("batchnorm.ops.triton.") and "support" not in m]:
        monkeypatch.delitem(sys.modules, module)
    found = support._import_problem()
    assert found is not None
    assert found.startswith("Triton does not import (ModuleNotFoundError")


def test_a_smallest_kernel_that_does_not_start_gives_the_whole_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Launch:
        error: Exception = support.UnusableVariantError("smallest_kernel", "RuntimeError: no C compiler\n ^")

        @classmethod
        def start_smallest_kernel(cls, device: torch.device) -> None:
            raise cls.error

    monkeypatch.setitem(sys.modules, "batchnorm.ops.triton.launch", Launch)
    monkeypatch.setattr(triton, "launch", Launch, raising=False)
    assert support._launch_problem(CUDA) == "Triton kernels do not start (RuntimeError: no C compiler\n ^)"
    Launch.error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        support._launch_problem(CUDA)


@needs_triton
def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.1.0+git1")
    assert support._import_problem() == "Triton 3.1.0+git1 is older than 3.6"


def _train_forward(x: Tensor) -> Any:
    return triton.implementation("train_forward", eager.train_forward)(x, None, None, None, *ATTRIBUTES)


@needs_triton
def test_without_a_c_compiler_one_warning_gives_the_reason_and_eager_is_used(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.runtime.build import compile_module_from_src
    from triton.runtime.driver import driver

    class Driver:
        """Compiles the launcher on first use, as Triton's driver does."""

        def get_current_device(self) -> int:
            compile_module_from_src("int unused;", name="stub")
            return 0

    monkeypatch.undo()
    monkeypatch.setattr(support, "_known", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    x = torch.randn(4, 3)
    with pytest.warns(RuntimeWarning, match=r"slower.*Triton kernels do not start \(.*Failed to find C compiler"):
        results = _train_forward(x)
    torch.testing.assert_close(results, eager.train_forward(x, None, None, None, *ATTRIBUTES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train_forward(x)


@needs_triton
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: lost")])
def test_other_errors_reach_the_caller(gpu: None, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def launcher(name: str) -> Any:
        def fails(*args: Any) -> None:
            raise error

        return fails

    monkeypatch.setattr(triton, "_launcher", launcher)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        _train_forward(torch.randn(4, 3))
    assert support.problem(torch.device("cpu")) is None


def test_graph_capture_starts_no_kernel_and_stores_no_result(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    monkeypatch.setattr(support, "_launch_problem", lambda device: tried.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert support.problem(CUDA) is None
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert support.problem(CUDA) is None
    assert tried == [CUDA]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_backends_says_that_torch_has_no_cuda() -> None:
    assert batchnorm.backends()["cuda"] == "eager: this torch was built without CUDA"


def test_float64_empty_and_noncontiguous_running_statistics_use_eager(gpu: None) -> None:
    asked = []
    normalize = triton.implementation("normalize", lambda *args: asked.append(args[0]))
    for x in (torch.ones(2, 3, dtype=torch.float64), torch.empty(0, 3)):
        normalize(x)
    assert len(asked) == 2
    update = triton.implementation("update_running_", lambda *args: asked.append(args[0]))
    update(torch.ones(6)[::2], torch.ones(3), None)
    update(torch.ones(3), torch.ones(3), torch.ones(()))
    assert len(asked) == 4


def test_a_kernel_is_not_launched_with_a_freed_tensor(gpu: None) -> None:
    x, weight = torch.ones(4, 3), torch.ones(3)
    weight.untyped_storage().resize_(0)
    for name, arguments in (("train_forward", (x, weight)), ("update_running_", (torch.ones(3), weight))):
        operator = triton.implementation(name, lambda *_: pytest.fail("eager"))
        with pytest.raises(RuntimeError, match=f"batchnorm::{name} expects .* with its memory allocated, got"):
            operator(*arguments, None)


def test_every_operator_has_an_implementation_for_cuda() -> None:
    for name in triton.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fake_cuda_results_have_the_shapes_and_strides_of_the_real_ones(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    def everything(device: str) -> list[Tensor]:
        op = torch.ops.batchnorm
        x = torch.ones(4, 3, 5, 6, dtype=dtype, device=device).to(memory_format=layout)
        vector = x.new_ones(3, dtype=torch.promote_types(dtype, torch.float32))
        rows, index, weights = vector.expand(2, 3), torch.arange(4, device=device) % 2, x.new_ones(4, 5, 6)
        kept = (x, x, None, None, rows, rows, rows, None, None)
        return [
            *op.train_forward(x, vector, None, x, *ATTRIBUTES),
            *op.train_backward(x, x, None, None, vector, vector, vector, None, None, *ATTRIBUTES, True),
            *op.moments(x, index, weights, 2), *op.moments(x, None, None, 1),
            op.normalize(x, rows, None, rows, None, None, None, index, *ATTRIBUTES),
            *op.normalize_backward(*kept, index, 2, *ATTRIBUTES, False),
            *op.backward_reduce(*kept, index, 2, *ATTRIBUTES),
            *op.backward_apply(*kept, rows, rows, index, weights, *ATTRIBUTES, True),
            *op.copy_running(vector, vector),
        ]  # fmt: skip

    expected = everything("cpu")
    with FakeTensorMode():
        found = everything("cuda")
    for fake, real in zip(found, expected, strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
