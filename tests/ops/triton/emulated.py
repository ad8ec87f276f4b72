"""The compiled kernels in the emulator: the launches that a CUDA tensor gets, on CPU tensors.

The emulator must be installed for a whole process, which test_emulated.py starts. Tiles are small, so that small
tensors have several tiles and splits.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from batchnorm.ops.triton import fused, implementation, support, tiling
from batchnorm.ops.triton.variants import Launch
from tests.ops.implementations import SMALL_TILES
from tests.ops.triton.emulator.device import Device
from tests.ops.triton.emulator.driver import installed
from tests.ops.triton.emulator.schedule import Schedule
from tests.ops.triton.pairs import pairs_of

_CACHE = Path(__file__).parents[3] / "build" / "emulator"
_process = contextlib.ExitStack()  # ends with the process
_sampled: set[Any] = set()  # pairs of arguments that a sample has run
_variants: set[Any] = set()  # variants of kernels that a sample has run


def operator(name: str, *, sample: bool = False) -> Callable[..., Any]:
    """Return the operator that is registered for CUDA tensors. It fails if it does not run on kernels.

    Args:
        name: The operator's name.
        sample: Whether calls that need a new variant of a kernel, but have no new pair of arguments and no new
            constant, are computed on the CPU. Most of the emulator's time goes into compiling variants.
    """
    return _emulated(name, implementation(name, functools.partial(_refuse, name)), sample)


def forward_and_update() -> Callable[..., Any]:
    """Return the function that also updates the running statistics in forward's launches. It fails in the same way."""
    return _emulated("train_forward", fused(*(functools.partial(_refuse, name) for name in ("forward", "update"))))


def _emulated(name: str, call: Callable[..., Any], sample: bool = False) -> Callable[..., Any]:
    used = device()

    def emulated(*args: Any) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        if any(t.numel() == 0 or t.dtype == torch.float64 for t in tensors[:1]) or (
            sample and not _in_sample(call, args)
        ):
            return getattr(torch.ops.batchnorm, name)(*args)
        with used.allocations:
            results = call(*args)
        for i, t in enumerate(results if isinstance(results, tuple) else [results]):
            if isinstance(t, Tensor):
                used.allocations.check_written(t, f"Result {i} of {name}")
        return results

    return emulated


def _in_sample(call: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether this call has a new pair of arguments or constant, or no new variant, and if so, remember it."""
    found: set[Any] = set()
    variants: set[Any] = set()

    def note(launch: Launch, tensors: Sequence[Tensor | None], floats: Sequence[float]) -> None:
        function = launch.kernel.function
        found.update(pairs_of(function, dict(zip(function.arg_names, tensors, strict=False)) | launch.constants))
        found.update((function, *constant) for constant in launch.constants.items())
        kinds = (None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
        large = (size >> 31 > 0 for size in launch.sizes)
        variants.add((function, *kinds, *large, *launch.constants.values()))

    with mock.patch.object(Launch, "start", note):  # nothing starts
        call(*args)
    chosen = variants <= _variants or not found <= _sampled
    if chosen:
        _sampled.update(found)
        _variants.update(variants)
    return chosen


def _refuse(name: str, *args: Any) -> None:
    raise AssertionError(f"{name} used eager for {[tuple(t.shape) for t in args if isinstance(t, Tensor)]}.")


@functools.cache
def device() -> Device:
    """Install the emulator in this process, which runs only these tests."""
    from batchnorm.ops.triton.kernels import finish

    tiling.TABLE.update(dict.fromkeys(tiling.TABLE, SMALL_TILES))
    support.problem = lambda device: None  # type: ignore[assignment]
    finish.FAN = finish.tl.constexpr(4)  # merges of several levels
    seed = os.environ.get("BATCHNORM_EMULATOR_SEED")
    found = Device(Schedule(None if seed is None else int(seed)))
    _process.enter_context(installed(found, _CACHE))
    return found
