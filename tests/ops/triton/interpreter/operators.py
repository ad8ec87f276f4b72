"""The kernels in Triton's interpreter: the launches that a CUDA tensor gets, on CPU tensors.

Three differences between the interpreter and a device are corrected: the rounding to bfloat16, the order of sums, and
warnings of infinity. New memory holds NaN, which shows values that no program writes. Tiles are small, so that small
tensors have several tiles and splits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.ops import registration
from batchnorm.ops.triton import implementation, support, tiling
from batchnorm.ops.triton.frame import Frame
from batchnorm.ops.triton.settings import Settings


def operator(name: str) -> Callable[..., Any]:
    """Return the operator that is registered for CUDA tensors."""
    _use_interpreter()
    return implementation(name, registration.eager_implementation(name))


@functools.cache
def _use_interpreter() -> None:
    """Prepare this process, which runs only these tests."""
    from batchnorm.ops.triton.kernels import finish

    np.seterr(invalid="ignore", over="ignore")
    small = Settings(tile=256, warps=1, programs=2, row_bytes=64, once=1024, ahead=2)
    tiling.TABLE.update(dict.fromkeys(tiling.TABLE, small))
    support.problem = lambda device: None  # type: ignore[assignment]
    Frame.result = _poisoned(Frame.result)  # type: ignore[method-assign]
    Frame.vectors = _poisoned(Frame.vectors)  # type: ignore[method-assign]
    finish.FAN = finish.tl.constexpr(4)  # merges of several levels
    _patch_rounding()
    _patch_sums()
    _patch_patching()


def _poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        results = make(*args)
        for t in (results,) if isinstance(results, Tensor) else results:
            t.fill_(torch.nan)
        return results

    return made


def _patch_rounding() -> None:
    """Round correctly to bfloat16; the interpreter rounds toward zero, or loses a carry."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_float


def _patch_sums() -> None:
    """Sum pairwise along every axis, as a device does; NumPy adds one by one along the first."""
    from triton.runtime import interpreter

    def pairwise(self: Any, values: Any) -> Any:
        if self.axis is None:
            return self.to_tensor(np.ascontiguousarray(values.handle.data).sum(), values.dtype)
        data = np.moveaxis(values.handle.data, self.axis, -1)
        result = np.ascontiguousarray(data).sum(-1, keepdims=self.keep_dims)
        return self.to_tensor(np.moveaxis(result, -1, self.axis) if self.keep_dims else result, values.dtype)

    interpreter.ReduceOps.sum = pairwise


def _patch_patching() -> None:
    """Patch the interpreter's language once per launch; it would patch it again for every function call."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: list[object] = []

    def patch_once(function: Any) -> Any:
        languages = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        if patched and all(language in patched for language in languages):
            return interpreter._LangPatchScope()
        scope = patch(function)
        first, restore = not patched, scope.restore
        patched.extend(languages)

        def forget() -> None:
            patched.clear()
            restore()

        if first:
            scope.restore = forget
        return scope

    interpreter._patch_lang = patch_once
