"""Launches and the host's time of a layer, on a driver without a device; prints them as JSON.

python -m tests.ops.triton.launches
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

import batchnorm
from batchnorm.ops import compiled, direct, registration, strict, triton
from batchnorm.ops.triton import launch, support
from batchnorm.ops.triton.variants import Kernel, Launch
from tests.ops import native_node
from tests.ops.triton import stub_driver

SHAPES = {"fits": (8, 16, 14, 14), "streamed": (32, 64, 32, 32)}
ATTRIBUTES = (1e-5, "relu", 0.0)

# The arguments of Triton's launcher before the kernel's: the grid, the stream, the function and its metadata, and what
# only hooks use.
_TARGET, _FOR_HOOKS = 6, 3


def main() -> None:
    """Print the launches and microseconds of each pass, and what was compiled."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"  # the default of Triton 3.10
    libc = ctypes.CDLL(None)
    for parameter, value in (
        (-3, 2**25),
        (-1, 2**31 - 1),
    ):  # keep freed memory, as on a GPU: M_MMAP_THRESHOLD (not more) and M_TRIM_THRESHOLD
        assert libc.mallopt(parameter, value) == 1
    torch.set_num_threads(1)
    compiler = shutil.which("cc")
    assert compiler is not None
    with tempfile.TemporaryDirectory() as directory:
        stub = stub_driver.install(Path(directory), compiler)
        _serve_the_cpu()
        found: dict[str, Any] = {"layers": {name: _layer(stub, shape) for name, shape in SHAPES.items()}}
        found["variants"] = _variants()
        found["differing"] = _differing()
        found["unfused"] = [k.name for k in _compiled() if not k.metadata.enable_fp_fusion]
        found["replayed"] = _replayed()
        found["errors"] = _errors(stub)
        print(json.dumps(found))


def _serve_the_cpu() -> None:
    support.problem = lambda device: None  # type: ignore[assignment]
    if strict._native is None:
        strict.AVAILABLE = False  # the others are only for the CPU
    else:
        strict._native = native_node.launched(strict._native)
    direct.is_direct = lambda *tensors: direct.unobserved(tensors)  # type: ignore[assignment]
    library = torch.library.Library("batchnorm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once a process, that this overrides the compiled operators
        for name in triton.OPERATORS:
            implementation = triton.implementation(name, registration.eager_implementation(name))
            library.impl(name, implementation, "CPU", allow_override=True)
    _serve_the_cpu.library = library  # type: ignore[attr-defined]  # its registrations end with it


def _layer(stub: stub_driver.Stub, shape: tuple[int, ...]) -> dict[str, tuple[int, float]]:
    """Return the launches and the microseconds of each pass of a layer."""
    x, dy = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    layer = batchnorm.BatchNormAct2d(shape[1], activation="relu")
    inputs = [x, layer.weight, layer.bias]
    passes: dict[str, Callable[[], object]] = {
        "forward": lambda: layer(x),
        "forward and backward": lambda: torch.autograd.grad(layer(x), inputs, dy),
    }
    found = {name: _measured(stub, step) for name, step in passes.items()}
    layer.eval()
    return found | {"evaluation": _measured(stub, lambda: layer(x))}


def _measured(stub: stub_driver.Stub, step: Callable[[], object]) -> tuple[int, float]:
    step()  # compiles
    before = stub.launches()
    step()
    count = stub.launches() - before
    times = []
    for _ in range(20):
        start = time.process_time()
        for _ in range(50):
            step()
        times.append((time.process_time() - start) / 50)
    return count, round(min(times) * 1e6, 1)


def _kernels() -> list[Kernel]:
    return [value for value in vars(launch).values() if isinstance(value, Kernel)]


def _compiled() -> list[Any]:
    """Return every kernel that Triton has compiled."""
    caches = (cache for kernel in _kernels() for cache, *_ in kernel.function.device_caches.values())
    return [compiled for cache in caches for compiled in cache.values()]


def _calls() -> Iterable[Callable[[], object]]:
    """Yield calls that differ in everything that Triton specializes."""
    memory = torch.zeros(2 * 8 * 5 * 5 + 64)

    def at(start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        flat = memory.view(dtype)[start:]
        return flat[: torch.Size(shape).numel()].view(shape)

    for dtype in (torch.float32, torch.bfloat16):
        for start in (0, 1):  # the second is not a multiple of 16 bytes
            x, vector = at(start, (2, 8, 5, 5), dtype), at(start, (8,), torch.float32)
            for weight in (None, vector):
                yield lambda x=x, v=vector, w=weight: launch.normalize(x, v, None, v, w, w, None, None, *ATTRIBUTES)
    for eps in (1, 0):  # integers, which Triton specializes
        yield lambda x=x, v=vector, e=eps: launch.normalize(x, v, None, v, v, v, None, None, e, *ATTRIBUTES[1:])
    running, tracked = torch.zeros(2, 8), torch.zeros((), dtype=torch.int64)
    for m in (100, 2**31, 2**40):
        for counter in (None, tracked):
            yield lambda m=m, c=counter: launch.update_running_(*running, c, *running, running[0], m, None, 0.1, False)


def _variants() -> dict[str, int]:
    """Return the number of variants started directly, and of those that Triton then compiles for the same calls."""
    before = len(_compiled())
    calls = list(_calls())
    for call in (*calls, *calls):
        call()
    direct = len(_compiled())
    knobs.runtime.launch_enter_hook.add(print_nothing := lambda metadata: None)  # Triton starts each launch itself
    for call in calls:
        call()
    knobs.runtime.launch_enter_hook.remove(print_nothing)
    return {"compiled": direct - before, "missed": len(_compiled()) - direct}


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[Any, ...]]]:
    """Yield the arguments of all launches from now on, without those for hooks."""
    passed: list[tuple[Any, ...]] = []
    launch_by_triton = CudaLauncher.__call__

    @functools.wraps(launch_by_triton)
    def record(self: Any, *arguments: Any) -> None:
        used = (*arguments[:_TARGET], *arguments[_TARGET + _FOR_HOOKS :])
        passed.append(tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in used))
        launch_by_triton(self, *arguments)

    CudaLauncher.__call__ = record  # type: ignore[method-assign, assignment]
    yield passed
    CudaLauncher.__call__ = launch_by_triton  # type: ignore[method-assign]


def _differing() -> list[str]:
    """Return the kernels to whose launcher a direct start passes other arguments than Triton does."""
    found: list[str] = []
    start = Launch.start

    def start_twice(self: Launch, tensors: Any, floats: Any) -> None:
        passed.clear()
        self._bound.clear()
        for _ in range(2):
            start(self, tensors, floats)
        end = _TARGET + len(tensors) + len(floats) + len(self.sizes)  # the launcher skips the constants
        by_triton, direct = ((*arguments[:end], len(arguments)) for arguments in passed)
        if by_triton != direct or not self._bound:
            found.append(f"{self.kernel.function.fn.__name__}: {by_triton} and {direct}")

    Launch.start = start_twice  # type: ignore[method-assign, assignment]
    with _recorded() as passed:
        for call in _calls():
            call()
    Launch.start = start  # type: ignore[method-assign]
    return found


def _steps() -> Iterable[Callable[[bool], object]]:
    """Yield steps of layers, whose argument says whether the residual is x itself."""
    options: list[dict[str, Any]] = [
        {}, {"momentum": None}, {"on_nonfinite": "skip"}, {"affine": False}, {"track_running_stats": False},
        {"activation": "silu"},
    ]  # fmt: skip
    for shape in SHAPES.values():
        for given in options:
            layer = batchnorm.BatchNormAct2d(shape[1], **({"activation": "relu"} | given))
            for training in (True, False):

                def step(alone: bool, shape: Any = shape, layer: Any = layer, training: bool = training) -> None:
                    x = torch.zeros(shape, requires_grad=True)
                    residual = x if alone else torch.zeros(shape, requires_grad=True)
                    layer.train(training)(x, residual).backward(torch.zeros(shape))

                yield step


def _replayed() -> dict[str, Any] | None:
    """Return the passes started again, and those whose launches differ from launches prepared for the same tensors."""
    native = compiled.autograd_module()
    if native is None:
        return None
    counts, again = {"passes": 0, "launches": 0}, triton.start_again
    found: list[str] = []
    replays: list[tuple[Any, ...]] = []
    addresses: list[int | None] = []

    def start_again(key: bytes, pointers: tuple[int | None, ...]) -> bool:
        passed.clear()
        if again(key, pointers):
            counts["passes"] += 1
            counts["launches"] += len(passed)
            replays[:], addresses[:] = passed, pointers
            passed.clear()
        return False

    def start(name: str, *arguments: Any) -> bool:
        done = triton.start(name, *arguments)
        # Scratch memory is allocated for each start.
        given = {a for launch in (*passed, *replays) for a in launch if type(a) is int and a > 2**32}
        scratch = given - {*addresses}
        both = [
            [tuple("scratch" if a in scratch else a for a in launch) for launch in some] for some in (passed, replays)
        ]
        if replays and both[0] != both[1]:
            found.append(f"{name}: {both}")
        replays.clear()
        return done

    with _recorded() as passed:
        native.set_functions(start, start_again)
        for step in _steps():
            step(True)
            step(False)
        native.set_functions(triton.start, triton.start_again)
    return counts | {"differing": found}


def _error(stub: stub_driver.Stub, call: Callable[[], object]) -> str:
    """Return the error of a call whose first load or launch fails on the device."""
    stub.fail_next()
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "none"


def _errors(stub: stub_driver.Stub) -> dict[str, Any]:
    """Return the errors of a launch and of a load that fail, and the launches of the next call after each."""
    layer, x = batchnorm.BatchNormAct2d(16, activation="relu"), torch.zeros(SHAPES["fits"])
    layer(x)
    found = {}
    for name, values in (("launch", x), ("load", x.half())):
        error = _error(stub, lambda values=values: layer(values))
        before = stub.launches()
        layer(values)
        found[name] = error, stub.launches() - before
    return found


if __name__ == "__main__":
    main()
