"""Launches by Triton's own launcher on a driver without a device, and variants that do not compile or start."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

import batchnorm
from batchnorm.ops import compiled, registration, triton
from batchnorm.ops.triton import launch, support
from batchnorm.ops.triton.variants import Kernel, Launch

ROOT = Path(__file__).parents[3]
ATTRIBUTES = (1e-5, "relu", 0.0)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what launches.py prints."""
    command = [sys.executable, "-m", "tests.ops.triton.launches"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


@needs_compiler
@pytest.mark.parametrize(
    ("layer", "direction", "expected"),
    [
        ("fits", "forward", 1), ("fits", "forward and backward", 2), ("fits", "evaluation", 1),
        ("streamed", "forward", 2), ("streamed", "forward and backward", 4), ("streamed", "evaluation", 1),
    ],
)  # fmt: skip
def test_a_layer_makes_few_launches(found: dict[str, Any], layer: str, direction: str, expected: int) -> None:
    launches, microseconds = found["layers"][layer][direction]
    assert launches == expected
    assert microseconds < 2000  # the benchmark prints it; a loaded machine takes several times as long


@needs_compiler
def test_direct_launches_tell_apart_all_variants_that_triton_does(found: dict[str, Any]) -> None:
    assert found["variants"]["compiled"] >= 11
    assert found["variants"]["missed"] == 0


@needs_compiler
def test_direct_launches_pass_the_arguments_that_triton_passes(found: dict[str, Any]) -> None:
    assert found["differing"] == []


@needs_compiler
@pytest.mark.skipif(compiled.autograd_module() is None, reason="no node in C++ in this build")
def test_a_pass_that_starts_again_makes_the_launches_of_a_prepared_one(found: dict[str, Any]) -> None:
    replayed = found["replayed"]
    assert replayed["differing"] == []
    assert replayed["passes"] > 40
    assert replayed["launches"] > replayed["passes"]


@needs_compiler
def test_every_kernel_fuses_products_and_sums_whatever_triton_does_by_default(found: dict[str, Any]) -> None:
    assert found["unfused"] == []


@needs_compiler
@pytest.mark.parametrize("action", ["launch", "load"])
def test_an_error_of_the_device_reaches_the_caller_and_the_next_call_starts_the_kernel(
    found: dict[str, Any], action: str
) -> None:
    error, launches = found["errors"][action]
    assert error == "Triton Error [CUDA]: an illegal memory access was encountered"
    assert launches == 1


class _Planted:
    """A kernel that starts nothing, and fails for bfloat16 if it has an error."""

    arg_names = ("x_ptr", "y_ptr", "ACTIVATION")
    fn = SimpleNamespace(__name__="planted_kernel")

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.started = error, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def start(x: torch.Tensor, *others: object, **constants: object) -> None:
            self.started += 1
            if self.error is not None and x.dtype == torch.bfloat16:
                raise self.error

        return start


@pytest.fixture
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(support, "problem", lambda device: None)
    monkeypatch.setattr(support, "_unusable", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, kernel in list(vars(launch).items()):
        if isinstance(kernel, Kernel):
            monkeypatch.setattr(launch, name, Kernel(_Planted()))
    support._warn_once.cache_clear()
    yield
    support._warn_once.cache_clear()


def _normalize(dtype: torch.dtype) -> torch.Tensor:
    x, vector = torch.tensor([[-1.0, 2.0]], dtype=dtype), torch.ones(2)
    operator = triton.implementation("normalize", registration.eager_implementation("normalize"))
    y: torch.Tensor = operator(x, vector, None, vector, None, None, None, None, *ATTRIBUTES)
    return y


_COMPILER = "at 3:4:\n    x = load(\n        ^\npassing None is not supported\n        ^"


@pytest.mark.usefixtures("_kernels_on_the_cpu")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PassManager::run failed"), OutOfResources(1 << 20, 1 << 16, "shared memory"),
        PTXASError("ptxas fatal"), AssertionError(), OSError("no space left on device"), RuntimeError(_COMPILER),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_variant_that_fails_uses_eager_and_the_others_use_their_kernels(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    planted = _Planted(error)
    monkeypatch.setattr(launch, "_NORMALIZE", Kernel(planted))
    cause = str(error).strip() or "no message"
    with pytest.warns(RuntimeWarning, match=r"slower, where it needs the Triton kernel planted_kernel\(x=bf") as w:
        y = _normalize(torch.bfloat16)
    assert len(w) == 1
    assert str(w[0].message).endswith(f"{type(error).__name__}: {cause}")
    torch.testing.assert_close(y, torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _normalize(torch.bfloat16)
        assert planted.started == 1  # it is not tried again
        _normalize(torch.float32)
        assert planted.started == 2
        launch.moments(torch.ones(2, 2, dtype=torch.bfloat16), None, None, 1)
    report = batchnorm.backends()["cuda"]
    assert report.startswith("triton: compiled at first use, except\neager: planted_kernel(x=bfloat16")
    assert report.endswith(f"{type(error).__name__}: {cause}")
    assert report.count("eager:") == 1


@pytest.mark.usefixtures("_kernels_on_the_cpu")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"), torch.AcceleratorError("CUDA error: an illegal memory access"), MemoryError(),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_of_the_device_reaches_the_caller_and_does_not_give_the_variant_up(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    planted = _Planted(error)
    monkeypatch.setattr(launch, "_NORMALIZE", Kernel(planted))
    for attempt in (1, 2):
        with pytest.raises(type(error)) as raised:
            _normalize(torch.bfloat16)
        assert raised.value is error
        assert planted.started == attempt
    assert batchnorm.backends()["cuda"] == "triton: compiled at first use"


@pytest.mark.usefixtures("_kernels_on_the_cpu")
def test_a_variant_that_fails_keeps_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = _Planted(RuntimeError("PassManager::run failed"))
    monkeypatch.setattr(launch, "_NORMALIZE", Kernel(planted))
    x, vector = torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2)
    operator = triton.implementation("normalize", registration.eager_implementation("normalize"))
    with pytest.warns(RuntimeWarning, match="planted_kernel"):
        operator(x, vector, None, vector, None, None, None, None, *ATTRIBUTES)
    alive = weakref.ref(x)
    planted.error = None  # its traceback has frames that use x
    del x
    gc.collect()
    assert alive() is None


def test_threads_start_a_new_variant_one_after_the_other() -> None:
    running: list[int] = []
    seen: list[int] = []

    class Slow(_Planted):
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def start(*arguments: object, **constants: object) -> None:
                running.append(1)
                time.sleep(0.01)
                seen.append(len(running))
                running.pop()

            return start

    started, x = Launch(Kernel(Slow()), (1,), (1,), {}), torch.ones(1)
    with ThreadPoolExecutor(2) as pool:
        for start in [pool.submit(started.start, (x, None), ()) for _ in range(4)]:
            start.result()
    assert seen == [1, 1, 1, 1]
