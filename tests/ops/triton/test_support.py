"""Who serves CUDA tensors, and what is said where the kernels do not."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

import batchnorm
from batchnorm.ops import triton
from batchnorm.ops.triton import support

CUDA = torch.device("cuda:0")


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


def test_a_supported_device_is_served_without_a_word(gpu: None) -> None:
    assert support.problem(CUDA) is None


def test_eager_is_chosen_without_a_warning(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(support.KERNELS, "eager")
    assert support.problem(CUDA) == "BATCHNORM_GPU_KERNELS=eager"
    assert batchnorm.backends()["cuda"] == "eager: BATCHNORM_GPU_KERNELS=eager"


def test_an_unknown_choice_is_warned_of(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_where_the_kernels_cannot_serve_one_warning_says_why(
    gpu: None, monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str
) -> None:
    owner = next(o for o in (torch.cuda, torch.version, support) if hasattr(o, name))
    monkeypatch.setattr(owner, name, value)
    with pytest.warns(RuntimeWarning, match=f"in plain torch operations, slower: .*{reason}.*Install what is missing"):
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


def test_a_kernel_that_does_not_start_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Launch:
        @staticmethod
        def start_one_kernel(device: torch.device) -> None:
            raise RuntimeError("first line\nFailed to find C compiler")

    monkeypatch.setitem(sys.modules, "batchnorm.ops.triton.launch", Launch)
    monkeypatch.setattr(triton, "launch", Launch, raising=False)
    assert support._launch_problem(CUDA) == "a Triton kernel does not start (RuntimeError: Failed to find C compiler)"


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_backends_says_that_torch_has_no_cuda() -> None:
    assert batchnorm.backends()["cuda"] == "eager: this torch is built without CUDA"


def test_float64_empty_and_odd_running_statistics_stay_with_the_eager_implementation(gpu: None) -> None:
    asked = []
    normalize = triton.implementation("normalize", lambda *args: asked.append(args[0]))
    for x in (torch.ones(2, 3, dtype=torch.float64), torch.empty(0, 3)):
        normalize(x)
    assert len(asked) == 2
    update = triton.implementation("update_running_", lambda *args: asked.append(args[0]))
    update(torch.ones(6)[::2], torch.ones(3), None)
    update(torch.ones(3), torch.ones(3), torch.ones(()))
    assert len(asked) == 4


def test_every_operator_has_an_implementation_for_cuda() -> None:
    for name in triton.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CUDA")
